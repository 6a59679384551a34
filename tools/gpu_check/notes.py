"""JSON lines, written as they are found: what a part of the check found, or why it found nothing."""

from __future__ import annotations

import argparse
import json
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

LONGEST = 600  # characters of an error
SHARE = 0.88  # of a stage's seconds, after which it begins nothing new


def without_numbers(value: Any) -> Any:
    """The same with "dry" for every fraction: no number of a dry run is a measurement."""
    if isinstance(value, dict):
        return {key: without_numbers(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_numbers(item) for item in value]
    return "dry" if isinstance(value, float) else value


class Notes:
    """Appends rows to one file.

    Args:
        path: the file; several stages may append to it at once.
        stage: whose rows these are.
        dry: whether stand-ins ran.
        seconds: after which nothing new begins.
    """

    def __init__(self, path: Path, stage: str, *, dry: bool, seconds: float) -> None:
        self.path, self.stage, self.dry, self.red = path, stage, dry, 0
        self.ends = time.monotonic() + SHARE * seconds

    def note(self, **row: Any) -> None:
        """One row; with `red`, why something is not as it should be."""
        self.red += is_red(row)
        row = {"stage": self.stage, **({"dry": True, **without_numbers(row)} if self.dry else row)}
        text = json.dumps(row, default=str)
        with self.path.open("a") as file:
            file.write(text + "\n")
        print(text[:300], flush=True)

    def section(self, name: str, call: Callable[[], Any]) -> None:
        """Notes what `call` returns (None: it made its own notes), or how it failed; nothing once the time is over."""
        if time.monotonic() > self.ends:
            self.note(section=name, skipped="no time")
            return
        began = time.monotonic()
        try:
            found = call()
        except (Exception, SystemExit) as error:
            reason, where = f"{type(error).__name__}: {error}"[:LONGEST], traceback.format_exc()[-2 * LONGEST :]
            self.note(section=name, red=reason, where=where)
            return
        if found is not None:
            self.note(section=name, seconds=round(time.monotonic() - began, 1), found=found)

    def end(self) -> None:
        """Ends the process.

        Raises:
            SystemExit: 1 if something was red, else 0.
        """
        raise SystemExit(1 if self.red else 0)


def count_rows(path: Path, stage: str) -> tuple[int, int, int]:
    """How many rows with findings a stage has written, how many red ones, and how many parts had no time."""
    rows = [row for row in read_rows(path) if row["stage"] in (stage, "?") and "machine" not in row]
    red = sum(map(is_red, rows))
    skipped = sum("skipped" in row for row in rows)
    return len(rows) - red - skipped, red, skipped


def is_red(row: dict[str, Any]) -> bool:
    """Whether a row, or the row of a benchmark in it, says why it has no number."""
    return bool(row.get("red") or row.get("row", {}).get("red"))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All whole rows of a file; a process that was killed may leave half of one."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            rows.append({"stage": "?", "red": f"half a row: {line[:80]}"})
    return rows


def arguments(doc: str | None, *more: str) -> tuple[argparse.Namespace, Notes]:
    """The options of every part, `more` positional ones, and its notes."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    for name in more:
        parser.add_argument(name)
    parser.add_argument("--rows", type=Path, required=True, help="the file for JSON lines")
    parser.add_argument("--stage", required=True, help="the name that rows get")
    parser.add_argument("--dry", action="store_true", help="on the CPU, with stand-ins")
    parsed = parser.parse_args()
    seconds = float(os.environ.get("GPU_CHECK_SECONDS", "inf"))
    return parsed, Notes(parsed.rows, parsed.stage, dry=parsed.dry, seconds=seconds)
