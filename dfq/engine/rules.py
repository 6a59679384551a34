"""How a graph that is no network is refused, and the rules that its numbers and tensors have in common."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from dfq_kernels.activations import activation_of
from dfq_kernels.integers import Grid

Shape = tuple[int, ...]
LARGEST = 2**31 - 1  # elements of a value, for one image; sums of a layer
LARGEST_SIDE = 2**16
LARGEST_CONSTANT = 2.0**40  # in magnitude: no sum or product of constants and integers leaves fp32, so none is NaN


class GraphError(ValueError):
    """A graph that is no network."""


def require(ok: bool, name: str, rule: str, value: Any) -> None:
    """Raises `integer graph: <name> must be <rule>, got <value>` unless `ok`."""
    if not ok:
        raise GraphError(f"integer graph: {name} must be {rule}, got {value!r}")


def check_grid(name: str, grid: Grid) -> None:
    """Integers that fit a byte, a zero point among them, a scale that is an ordinary number."""
    integers = (grid.zero_point, grid.quant_min, grid.quant_max)
    require(all(type(value) is int for value in integers), f"the grid of {name}", "integers", integers)
    low, high = (-128, 127) if grid.quant_min < 0 else (0, 255)
    require(low <= grid.quant_min < grid.quant_max <= high, f"the grid of {name}", "of 8 bits at most", integers)
    inside = grid.quant_min <= grid.zero_point <= grid.quant_max
    require(inside, f"the zero point of {name}", "on its grid", grid.zero_point)
    check_scale(f"the scale of {name}", grid.scale)


def check_scale(name: str, scale: Any) -> None:
    """An fp32 number that is not subnormal."""
    normal = isinstance(scale, float) and 2.0**-126 <= scale <= 2.0**64
    require(normal and float(torch.tensor(scale)) == scale, name, "fp32 in [2^-126, 2^64]", scale)


def check_activation(activation: Any) -> None:
    """One that is known, whose numbers make no NaN."""
    try:
        known = activation_of(activation)
    except ValueError as error:
        raise GraphError(f"integer graph: {error}") from None
    small = known.bounds is not None or abs(known.a) <= LARGEST_CONSTANT
    require(small, "an activation's number", "at most 2^40 in magnitude", activation)


def check_sides(name: str, value: Any, length: int, least: int) -> None:
    """A tuple of sides."""
    numbers = isinstance(value, tuple) and len(value) == length and all(type(side) is int for side in value)
    ok = numbers and all(least <= side <= LARGEST_SIDE for side in value)
    require(ok, name, f"{length} integers in [{least}, {LARGEST_SIDE}]", value)


def check_tensor(name: str, value: Any, dtype: torch.dtype, shape: Shape | None = None) -> None:
    """Of a dtype and a shape, without NaN and numbers that make it."""
    fits = isinstance(value, Tensor) and value.dtype == dtype and (shape is None or tuple(value.shape) == shape)
    got = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else value
    require(fits, name, f"{str(dtype).removeprefix('torch.')} {'' if shape is None else shape}".strip(), got)
    if dtype.is_floating_point:
        largest = float(value.abs().max()) if value.numel() else 0.0  # NaN, if there is one
        require(largest <= LARGEST_CONSTANT, name, "at most 2^40 in magnitude", largest)


def check_places(name: str, value: Any, shape: Shape, least: int, count: int, dtype: torch.dtype = torch.int32) -> None:
    """Indices of `count` things; least: -1 where there may be none."""
    check_tensor(name, value, dtype, shape)
    require(value.numel() > 0, name, "at least one", 0)
    low, high = int(value.min()), int(value.max())
    require(least <= low and high < count, name, f"in [{least}, {count})", (low, high))


def check_size(name: str, shape: Shape) -> None:
    """A value that its indices can count."""
    require(0 < math.prod(shape) <= LARGEST, name, f"of 1 to {LARGEST} elements", shape)
