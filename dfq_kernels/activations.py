"""Activations that fp32 operations define: their names, their numbers, and what is known of them.

    relu            max(t, 0)                          hardtanh(a,b)   min(max(t, a), b)
    relu6           min(max(t, 0), 6)                  leaky_relu(a)   t > 0 ? t : a * t
    hardsigmoid     clamp(t + 3, 0, 6) * (1/6)         hardswish       t * (clamp(t + 3, 0, 6) * (1/6))

Each operation is rounded on its own; numbers are rounded to fp32. An activation travels as text: a name, with its
numbers in brackets.
"""

from __future__ import annotations

import math
import re
import struct
from dataclasses import dataclass

# names, in the order of csrc/common/types.h, with how many numbers each has
NAMES: dict[str | None, int] = {
    None: 0, "relu": 0, "relu6": 0, "hardtanh": 2, "leaky_relu": 1, "hardsigmoid": 0, "hardswish": 0,
}  # fmt: skip
CODES = {name: code for code, name in enumerate(NAMES)}


@dataclass(frozen=True)
class Activation:
    """name: of `NAMES`; a, b: its numbers, 0 where it has none."""

    name: str | None
    a: float = 0.0
    b: float = 0.0

    @property
    def code(self) -> int:
        return CODES[self.name]

    @property
    def bounds(self) -> tuple[float, float] | None:
        """What a clamp keeps `t` within; None where the activation is no clamp."""
        if self.name is None:
            return -math.inf, math.inf
        known = {"relu": (0.0, math.inf), "relu6": (0.0, 6.0), "hardtanh": (self.a, self.b)}
        return known.get(self.name)

    @property
    def never_negative(self) -> bool:
        bounds = self.bounds
        return self.name == "hardsigmoid" if bounds is None else bounds[0] >= 0

    @property
    def saturates(self) -> bool:
        """Whether it is constant towards both ends."""
        bounds = self.bounds
        return self.name == "hardsigmoid" if bounds is None else math.isfinite(bounds[0]) and math.isfinite(bounds[1])

    def __str__(self) -> str:
        count = NAMES[self.name]
        numbers = ",".join(repr(number) for number in (self.a, self.b)[:count])
        return f"{self.name}({numbers})" if count else str(self.name)


def activation_of(text: str | None) -> Activation:
    """Back from text.

    Raises:
        ValueError: no such activation, or other numbers than it has.
    """
    if text is None:
        return Activation(None)
    match = re.fullmatch(r"([a-z_0-9]+)(?:\(([^()]*)\))?", text) if isinstance(text, str) else None
    rule = "activation must be None, relu, relu6, hardtanh(a,b), leaky_relu(a), hardsigmoid or hardswish"
    try:
        name = match[1] if match else ""
        numbers = [_fp32(float(number)) for number in (match[2] or "").split(",") if number] if match else []
    except (ValueError, OverflowError):
        raise ValueError(f"{rule}, got {text!r}") from None
    right = name in NAMES and len(numbers) == NAMES[name] and not any(math.isnan(number) for number in numbers)
    if not right or (name == "hardtanh" and numbers[0] > numbers[1]):
        raise ValueError(f"{rule}, got {text!r}")
    return Activation(name, *numbers)


def _fp32(value: float) -> float:
    if math.isinf(value):
        return value
    nearest: float = struct.unpack("f", struct.pack("f", value))[0]
    return nearest
