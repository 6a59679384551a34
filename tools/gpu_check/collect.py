"""Rows of a check to result files as the benchmarks write them: `python -m tools.gpu_check --collect OUT`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from benchmarks.machine import RESULTS, UNKNOWN, write_results
from tools.gpu_check.notes import read_rows


def collect(out: Path, commit: str | None, results: Path = RESULTS) -> list[Path]:
    """The files that were written: `<benchmark>-<gpu>.json`.

    Args:
        out: the output folder of a check.
        commit: of the code that was checked, where the machine had no git; None: the machine knew it.
        results: where the files go.

    Raises:
        SystemExit: a dry run, no machine, or a commit that nobody knows.
    """
    rows = [row for path in sorted(out.glob("*.jsonl")) for row in read_rows(path)]
    if any(row.get("dry") for row in rows):
        raise SystemExit(f"gpu_check: {out} is of a dry run: its numbers are no measurements")
    machine: dict[str, Any] | None = next((row["machine"] for row in rows if "machine" in row), None)
    if machine is None:
        raise SystemExit(f"gpu_check: {out} must have a row with the machine, got none")
    machine["commit"] = commit or machine["commit"]
    if machine["commit"] == UNKNOWN:
        raise SystemExit("gpu_check: the machine knew no commit: say it with --commit")
    name = "-".join(re.findall(r"[a-z0-9]+", str(machine["gpu"]).lower()))
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if "benchmark" in row:
            found.setdefault(row["benchmark"], []).append(row["row"])
    paths = []
    for benchmark, values in found.items():
        paths.append(results / f"{benchmark}-{name}.json")
        write_results(paths[-1], values, machine)
    return paths
