"""How errors of this package are worded: `<owner>: <name> must be <rule>, got <value>`, on one line."""

from __future__ import annotations

import operator
from typing import Any


def check(owner: str, name: str, value: Any, rule: str, ok: bool) -> None:
    """Raises `<owner>: <name> must be <rule>, got <value>` unless `ok`."""
    if not ok:
        raise ValueError(f"{owner}: {name} must be {rule}, got {value!r}")


def integer(owner: str, name: str, value: Any, least: int) -> int:
    """`value` as an int (NumPy's integers too), if it is one of at least `least`."""
    ok = not isinstance(value, bool) and hasattr(value, "__index__")
    check(owner, name, value, f"an integer of at least {least}", ok and operator.index(value) >= least)
    return operator.index(value)


def first_line(error: BaseException) -> str:
    """The first line of another library's error, or its type's name."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
