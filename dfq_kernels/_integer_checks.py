"""What several integer operators check of their arguments, and how their results are wrapped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dfq_kernels._checks import check_device, check_float, check_storage
from dfq_kernels.activations import activation_of
from dfq_kernels.integers import Constants, Epilogue, Grid, QuantizedTensor, Requantize, storage_width

MOST_OUTS = 4  # results on grids, of an operator and of what follows it
LARGEST_SUM = 2**31 - 1


def require(op: str, ok: bool, name: str, rule: str, value: object) -> None:
    """Raises `<op>: <name> must be <rule>, got <value>` unless `ok`."""
    if not ok:
        raise ValueError(f"{op}: {name} must be {rule}, got {value!r}")


def check_grid(op: str, name: str, grid: object) -> None:
    if not isinstance(grid, Grid):
        raise ValueError(f"{op}: {name} must be a Grid, got {type(grid).__name__}")
    numbers = (grid.zero_point, grid.quant_min, grid.quant_max)
    require(op, all(type(number) is int for number in numbers), name, "of integers", numbers)
    low, high = (-128, 127) if grid.quant_min < 0 else (0, 255)
    fits = low <= grid.quant_min < grid.quant_max <= high
    require(op, fits, name, "of at most 8 bits", (grid.quant_min, grid.quant_max))
    inside = grid.quant_min <= grid.zero_point <= grid.quant_max
    require(op, inside, f"{name}: zero_point", f"in [{grid.quant_min}, {grid.quant_max}]", grid.zero_point)
    normal = isinstance(grid.scale, float) and math.isfinite(grid.scale) and 2.0**-126 <= grid.scale <= 2.0**64
    require(op, normal, f"{name}: scale", "in [2^-126, 2^64]", grid.scale)


def check_quantized(op: str, name: str, x: object, dims: tuple[int, ...] = (4,)) -> None:
    """A quantized tensor whose memory fits its grid."""
    if not isinstance(x, QuantizedTensor):
        raise ValueError(f"{op}: {name} must be a QuantizedTensor, got {type(x).__name__}")
    check_grid(op, f"{name}: grid", x.grid)
    require(op, x.bits in (8, 4, 2) and x.grid.bits <= x.bits, f"{name}: bits", "8, 4 or 2 and hold its grid", x.bits)
    dtype = torch.int8 if x.grid.signed and x.bits == 8 else torch.uint8
    if not isinstance(x.q, Tensor) or x.q.dtype != dtype or x.q.layout is not torch.strided:
        got = x.q.dtype if isinstance(x.q, Tensor) else type(x.q).__name__
        raise ValueError(f"{op}: {name} must be of dtype {dtype}, got {got}")
    fits = x.q.dim() in dims and 0 not in x.q.shape[1:]
    rule = " or ".join(_SHAPES[count] for count in dims)
    require(op, fits, name, f"{rule} of at least one channel and pixel", tuple(x.q.shape))
    check_storage(op, name, x.q)


_SHAPES = {2: "[N, C]", 4: "[N, C, H, W]"}


def check_vector(op: str, name: str, vector: Tensor, channels: int, like: Tensor) -> None:
    """One number per channel, or per level of a grid."""
    check_float(op, name, vector)
    require(op, tuple(vector.shape) == (channels,), name, f"of shape ({channels},)", tuple(vector.shape))
    check_device(op, name, vector, like)


def check_constants(op: str, prefix: str, given: Constants, channels: int, grid: Grid, like: Tensor) -> None:
    """Of integers on `grid`: mean, mult and bias all or none, and a table alone."""
    names = [prefix + name for name in Constants._fields[:3]]
    require(op, len(given.norm) in (0, 3), ", ".join(names), "given together", f"{len(given.norm)} of them")
    for name, vector in zip(Constants._fields, given, strict=True):
        if vector is not None:
            check_vector(op, prefix + name, vector, grid.levels if name == "table" else channels, like)
    alone = given.table is None or (not given.norm and given.slope is None)
    require(op, alone, f"{prefix}table", "without mean, mult, bias and slope", "both")


def check_activation(op: str, activation: str | None) -> None:
    try:
        activation_of(activation)
    except ValueError as error:
        raise ValueError(f"{op}: {error}") from None


def check_pair(op: str, name: str, value: int | Sequence[int], least: int) -> list[int]:
    """Two integers of a window, one for each axis."""
    pair: list[Any] = list(value) if isinstance(value, (tuple, list)) else [value, value]
    fits = len(pair) == 2 and all(type(side) is int and least <= side <= 2**16 for side in pair)
    require(op, fits, name, f"one or two integers in [{least}, 65536]", value)
    return pair


Geometry = tuple[list[int], list[int], list[int], int]  # stride, padding and dilation, one for each axis; groups


def check_geometry(
    op: str, x_shape: Sequence[int], weight_shape: Sequence[int], stride: int | Sequence[int],
    padding: int | Sequence[int], dilation: int | Sequence[int], groups: int,
) -> Geometry:  # fmt: skip
    """Of a convolution of `[N, C, H, W]` with `[O, C / groups, kh, kw]`."""
    channels, (outer, inner, *kernel) = x_shape[1], weight_shape
    pairs = (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1))
    strides, paddings, dilations = (check_pair(op, *pair) for pair in pairs)
    fits = type(groups) is int and groups >= 1 and outer % groups == 0 and inner * groups == channels
    require(op, fits, "groups", f"a divisor of {channels} and {outer} channels that fits {inner} of the weight", groups)
    spans = zip(x_shape[2:], kernel, paddings, dilations, strict=True)
    inside = all(side + 2 * p >= d * (k - 1) + 1 for side, k, p, d in spans)
    require(op, inside, "weight", f"within {tuple(x_shape[2:])} and its padding", tuple(kernel))
    return strides, paddings, dilations, groups


def check_epilogue(
    op: str, activation: str | None, outs: Grid | Sequence[Grid], then: Requantize | None, packed: bool, channels: int,
    like: Tensor,
) -> Epilogue:  # fmt: skip
    """The arguments that every operator ends with."""
    check_activation(op, activation)
    outs = _check_grids(op, "outs", outs, least=0)
    width = [storage_width(grid.bits, channels) if packed else 8 for grid in outs]
    if then is None:
        return Epilogue(activation, outs, tuple(width))
    require(op, isinstance(then, Requantize), "then", "a Requantize", type(then).__name__)
    require(op, len(outs) > 0, "outs", "at least one grid where something follows", len(outs))
    nexts = _check_grids(op, "then: outs", then.outs, least=1)
    check_activation(op, then.activation)
    check_constants(op, "then: ", Constants(*then.constants), channels, outs[0], like)
    next_width = [storage_width(grid.bits, channels) if packed else 8 for grid in nexts]
    return Epilogue(activation, outs, tuple(width), replace(then, outs=nexts), tuple(next_width))


def _check_grids(op: str, name: str, grids: Grid | Sequence[Grid], least: int) -> tuple[Grid, ...]:
    """One grid or several, as a tuple."""
    some = (grids,) if isinstance(grids, Grid) else grids
    require(op, isinstance(some, (tuple, list)), name, "a Grid or a list of them", grids)
    require(op, least <= len(some) <= MOST_OUTS, name, f"{least} to {MOST_OUTS} grids", len(some))
    for index, grid in enumerate(some):
        check_grid(op, f"{name}[{index}]", grid)
    return tuple(some)


def wrap(results: list[Tensor], epilogue: Epilogue) -> tuple[QuantizedTensor, ...] | Tensor:
    """Results with their grids; the real numbers where no grid was asked for."""
    if not epilogue.outs:
        return results[0]
    return tuple(QuantizedTensor(q, grid, bits) for q, (grid, bits) in zip(results, epilogue.results, strict=True))
