"""The line without which a number is not a number: machine, versions, commit, date; and the file that results go to."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from dfq.running.checkpoint import write_atomic
from dfq.running.run_folder import versions

RESULTS = Path(__file__).parent / "results"
UNKNOWN = "unknown"  # a commit without git, a date that nobody noted


def commit_of(folder: Path) -> str:
    """The commit that is checked out; `-dirty` where files are changed, but for results of the benchmark before.

    `unknown`, and a line that says so, where git is not there or knows no commit.
    """

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=folder)

    try:
        described = git("describe", "--always")
    except FileNotFoundError:
        reason = "there is no git"
    else:
        if name := described.stdout.strip():
            changed = git("diff", "--quiet", "HEAD", "--", ":/", ":(top,exclude)benchmarks/results").returncode
            return f"{name}-dirty" if changed else name
        reason = (described.stderr.splitlines() or ["git knows no commit"])[0]
    print(f"benchmarks: the commit of these numbers is unknown: {reason}", file=sys.stderr)
    return UNKNOWN


COMMIT = commit_of(Path(__file__).parent)  # of the code that was imported, not of what lies there afterwards


def processor() -> str:
    """The CPU's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if "model name" in line), "unknown")


def machine_line() -> dict[str, Any]:
    """CPU and its instruction set, threads, GPU, versions, commit, date."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.9 has none
    isa = [
        name
        for name in ("avx2", "avx512_f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
        if capabilities.get(name)
    ]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    machine = {"cpu": f"{processor()} ({', '.join(isa)})", "threads": torch.get_num_threads(), "gpu": gpu}
    return {**machine, **versions(), "commit": COMMIT, "date": datetime.now(timezone.utc).date().isoformat()}


def results_file(what: str) -> Path:
    """Where results of this machine are kept: `<what>-<device>.json`."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu {processor()}"
    words = re.findall(r"[a-z0-9]+", re.sub(r"\((R|TM)\)", " ", name, flags=re.IGNORECASE).lower())
    return RESULTS / f"{what}-{'-'.join(words)}.json"


def write_results(path: Path, rows: list[dict[str, Any]], machine: dict[str, Any] | None = None) -> None:
    """Rows beside the machine line, whole or not at all; one line a row. machine: where they were made; None: here."""
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    write_atomic(
        path, f'{{\n "machine": {json.dumps(machine or machine_line())},\n "rows": [\n{lines}\n ]\n}}\n'.encode()
    )
