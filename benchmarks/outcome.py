"""Numbers that must not be published: red rows stand among the others, and a run that has some ends with 1."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.machine import write_results


class Red(Exception):
    """Why a row has no number."""


def red_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows that say why they have no number."""
    return [row for row in rows if "red" in row]


def finish(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes all rows.

    Raises:
        SystemExit: some rows are red.
    """
    write_results(path, rows)
    if red := red_rows(rows):
        raise SystemExit("\n".join([f"benchmarks: {len(red)} of {len(rows)} rows are red:", *map(json.dumps, red)]))
