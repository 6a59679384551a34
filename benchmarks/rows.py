"""Trainings as rows, each one file, so that several processes share the work and an interruption costs one row."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from benchmarks.machine import UNKNOWN
from dfq.cli.app import keep_freed_memory
from dfq.running.checkpoint import write_atomic


class Named(Protocol):
    """A training: where its result lies, and what it is called."""

    @property
    def path(self) -> Path: ...

    @property
    def name(self) -> str: ...


R = TypeVar("R", bound=Named)


def command(
    description: str | None, rows: Sequence[R], run: Callable[[R], Mapping[str, Any]], assemble: Callable[[], None]
) -> None:
    """The command line of a table: runs the rows that are not there and that nobody else is at, or assembles them."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0: all cores")
    parser.add_argument("--assemble", action="store_true", help="write the result file from the rows that are there")
    arguments = parser.parse_args()
    keep_freed_memory()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.assemble:
        assemble()
        return
    for row in rows:
        claim = row.path.with_suffix(".claim")
        if row.path.exists() or claim.exists() or arguments.only not in row.name:
            continue
        claim.parent.mkdir(parents=True, exist_ok=True)
        claim.touch()
        try:
            result = run(row)
            write_atomic(row.path, json.dumps(result).encode())
            print(f"{row.name}: {result['accuracy']:.2f} ({result['seconds']} s)", flush=True)
        finally:
            claim.unlink()


def found_rows(wanted: Sequence[R], before: Sequence[dict[str, Any]], named: Sequence[str]) -> list[dict[str, Any]]:
    """What was measured of each row that is wanted: lately, or else what the result file has of an earlier recipe.

    Every one names its commit, and the README marks those that are older than what they measure.

    Args:
        before: rows of the result file.
        named: what tells one row from another, there and here.
    """
    kept = {json.dumps([row[name] for name in named]): row for row in before}
    found = []
    for row in wanted:
        if row.path.exists():
            found.append(json.loads(row.path.read_text()))
        elif earlier := kept.get(json.dumps([getattr(row, name) for name in named])):
            found.append(earlier)
    return found


def with_commits(rows: Sequence[dict[str, Any]]) -> None:
    """A row that was measured lately names its commit and date, as those of before do, in place of its machine."""
    for row in rows:
        if where := row.pop("machine", None):
            row |= {"commit": where["commit"], "date": where.get("date", UNKNOWN)}
