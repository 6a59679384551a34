"""Which measured numbers are older than the code that they measure: `make readme` asks git and keeps the answer.

The answer is kept in benchmarks/results/ages.json, so that the README can be built, and tested, without a history.
"""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import RESULTS
from dfq.running.checkpoint import write_atomic

AGES = RESULTS / "ages.json"
ROOT = RESULTS.parent.parent
OPERATORS = ("dfq_kernels", "csrc/cpu", "csrc/common")
TRAINING = ("dfq/network", "dfq/layers", "dfq/quant", "dfq/method", "dfq/running/optimizers.py")
ACCURACY = (*TRAINING, "dfq/config.py", "dfq/running/seeds.py", "dfq/results/evaluate.py", "dfq/assets", *OPERATORS)
# a change of these may change a table's numbers
MEASURED = {
    "accuracy": ACCURACY,
    "students": (*ACCURACY, "dfq/models"),
    "kernels": OPERATORS,
    "steps": (*TRAINING, "dfq/running/execution.py", *OPERATORS),
    "integer": ("dfq/engine", "dfq/export", "dfq/layers", *OPERATORS),
    "onnx": ("dfq/export",),
    "networks": ("dfq/engine", "dfq/export", "dfq/layers", *OPERATORS),
    "zoo": ("dfq/network", "dfq/layers", "dfq/quant", "dfq/export", "dfq/engine", *OPERATORS),
}
# inside of them, what no CPU runs
ELSEWHERE = tuple(f":(exclude)dfq_kernels/{name}" for name in ("*/triton.py", "tiles.py", "integer_tiles.py",
                                                               "layers.py", "tuning"))  # fmt: skip
SHOWN = 4  # paths in a sentence


class NoHistory(Exception):
    """Why git cannot say what has changed."""


@dataclass(frozen=True)
class Age:
    """What has changed since a commit, and when last; nothing: the numbers are of today's code."""

    paths: tuple[str, ...]
    date: str


def age(root: Path, commit: str, paths: tuple[str, ...]) -> Age:
    """What of `paths` has changed from a commit to the one that is checked out.

    Raises:
        NoHistory: there is no git, or it does not know the commit.
    """
    since = f"{commit.removesuffix('-dirty')}..HEAD"
    command = ["git", "log", "--format=date %cs", "--name-only", since, "--", *paths, *ELSEWHERE]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=root)
    except FileNotFoundError as error:
        raise NoHistory("there is no git") from error
    if done.returncode != 0:
        raise NoHistory(f"git knows no commit {commit}")
    lines = [line for line in done.stdout.splitlines() if line]
    names = [line for line in lines if not line.startswith("date ")]
    changed = tuple(path for path in paths if any(f"{name}/".startswith(f"{path}/") for name in names))
    return Age(changed, next((line.removeprefix("date ") for line in lines), ""))


def kept(path: Path = AGES) -> dict[str, dict[str, Age]]:
    """The ages as `make readme` left them, by table and commit."""
    data = json.loads(path.read_text()) if path.exists() else {}
    return {table: {commit: Age(tuple(row["changed"]), row["last"]) for commit, row in rows.items()}
            for table, rows in data.items()}  # fmt: skip


def update(commits: dict[str, set[str]], root: Path = ROOT, path: Path = AGES) -> list[str]:
    """Writes the ages of each table's commits; where git cannot say, what was kept stays, and a line says so.

    Returns:
        The lines.
    """
    before, said = kept(path), list[str]()
    data: dict[str, dict[str, Any]] = {}
    for table, names in commits.items():
        data[table] = {}
        for commit in sorted(names):
            try:
                found: Age | None = age(root, commit, MEASURED[table])
            except NoHistory as error:
                found = before.get(table, {}).get(commit)
                said.append(f"readme: the age of {table} {commit} is {'as it was' if found else 'unknown'}: {error}")
            if found is not None:
                data[table][commit] = {"changed": found.paths, "last": found.date}
    write_atomic(path, (json.dumps(data, indent=1) + "\n").encode())
    return said


def mark(ages: dict[str, Age], commits: set[str]) -> str:
    """`†` if some numbers of these commits are older than what they measure, `‡` if nobody knows, else nothing."""
    if any(commit not in ages for commit in commits):
        return "‡"
    return "†" if any(ages[commit].paths for commit in commits) else ""


def legend(ages: dict[str, Age], commits: set[str]) -> str:
    """What the marks mean; nothing where there are none."""
    lines = []
    stale = [ages[commit] for commit in sorted(commits) if commit in ages and ages[commit].paths]
    if stale:
        paths = list(dict.fromkeys(f"`{path}`" for item in stale for path in item.paths))
        more = f" and {len(paths) - SHOWN} more" if len(paths) > SHOWN else ""
        last = max(item.date for item in stale)
        lines.append(f"† measured before the last change of {', '.join(paths[:SHOWN])}{more} ({last}).")
    if unknown := sorted(commits - ages.keys()):
        lines.append(f"‡ of unknown age: no history of {', '.join(unknown)} was at hand.")
    return " ".join(lines)
