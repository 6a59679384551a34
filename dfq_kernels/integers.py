"""Quantized tensors, packed weights, and what every integer operator ends with: plain data.

Maps are `[N, C, H, W]`, channels-last in memory. Integers of 4 or 2 bits may be packed, n = 8 / bits of them to a byte:
byte j of a pixel holds the channels j, j + C / n, j + 2 C / n, ..., the first in its lowest bits, so that neighbours in
memory are neighbours in the map.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from dfq_kernels.packing import STORED_BITS

FLAT = 5  # numbers of a grid in a flat list


@dataclass(frozen=True)
class Grid:
    """Integers `[quant_min, quant_max]` that stand for `(q - zero_point) * scale`; `scale` is rounded to fp32."""

    scale: float
    zero_point: int
    quant_min: int
    quant_max: int

    def __post_init__(self) -> None:
        if isinstance(self.scale, float) and abs(self.scale) < 1e38:  # what is beyond is refused by whoever gets it
            object.__setattr__(self, "scale", fp32_of(self.scale))

    @property
    def bits(self) -> int:
        """That hold every integer of the range, which need not begin at 0 or be symmetric."""
        if self.signed:
            return max(max(self.quant_max, 0).bit_length(), (-self.quant_min - 1).bit_length()) + 1
        return self.quant_max.bit_length()

    @property
    def signed(self) -> bool:
        return self.quant_min < 0

    @property
    def inverse(self) -> float:
        """`1 / scale`, rounded to fp32."""
        return fp32_of(1 / self.scale)  # of fp32 numbers, through fp64: the same

    @property
    def levels(self) -> int:
        """How many integers there are."""
        return self.quant_max - self.quant_min + 1

    @property
    def largest(self) -> int:
        """The greatest `|q - zero_point|`."""
        return max(self.quant_max - self.zero_point, self.zero_point - self.quant_min)


@dataclass(frozen=True)
class QuantizedTensor:
    """Integers and what they stand for.

    q: `[N, C, ...]`, int8 where the grid is signed, else uint8; packed where `bits` is 4 or 2: uint8 `[N, C / n, ...]`.
    """

    q: Tensor
    grid: Grid
    bits: int = 8

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the integers, not of the bytes."""
        return (self.q.shape[0], self.q.shape[1] * 8 // self.bits, *self.q.shape[2:])

    def integers(self) -> Tensor:
        """int64 `[N, C, ...]`."""
        return unpack_channels(self.q, self.bits, self.grid.signed).long()


@dataclass(frozen=True)
class PackedWeight:
    """A weight as the kernels read it; made by `pack_weight`.

    q: `[O, I, kh, kw]` channels-last, int8, or packed along I: uint8 `[O, I / n, kh, kw]`; sums: int32 `[O]`, of every
    output channel's integers; largest: the greatest sum of their magnitudes.
    """

    q: Tensor
    bits: int
    sums: Tensor
    largest: int

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """`(O, I, kh, kw)`."""
        outs, inner, height, width = self.q.shape
        return outs, inner * 8 // self.bits, height, width

    def integers(self) -> Tensor:
        """int8 `[O, I, kh, kw]`."""
        return unpack_channels(self.q, self.bits, signed=True)

    def bound(self, grid: Grid) -> int:
        """What sums of products with integers of a grid reach at most, as kernels form them: fields as they are stored,
        up to 128 in magnitude, times packed weights in the highest bits of a byte."""
        if self.bits == 8:
            return grid.largest * self.largest
        return max(grid.largest, 128) * self.largest << (8 - self.bits)

    def to(self, device: torch.device | str) -> PackedWeight:
        return PackedWeight(self.q.to(device), self.bits, self.sums.to(device), self.largest)


@dataclass(frozen=True)
class Requantize:
    """What follows an operator's first result: `t = (q - zero_point) * scale`, with a batch norm
    `t = (t - mean[c]) * mult[c] + bias[c]`, with a slope `t = t > 0 ? t : slope[c] * t`, or with a table alone
    `t = table[q - quant_min]`; then the activation and rounding to each of `outs`."""

    outs: tuple[Grid, ...]
    mean: Tensor | None = None
    mult: Tensor | None = None
    bias: Tensor | None = None
    activation: str | None = None
    slope: Tensor | None = None
    table: Tensor | None = None

    @property
    def constants(self) -> list[Tensor | None]:
        """As an argument of a torch operator: see `Constants`."""
        return [self.mean, self.mult, self.bias, self.slope, self.table]

    @property
    def norm(self) -> list[Tensor]:
        """mean, mult and bias, or nothing."""
        return Constants(*self.constants).norm


class Constants(NamedTuple):
    """What makes real numbers of integers, besides their grid; mean, mult and bias are given together or not at all."""

    mean: Tensor | None = None
    mult: Tensor | None = None
    bias: Tensor | None = None
    slope: Tensor | None = None
    table: Tensor | None = None

    @property
    def norm(self) -> list[Tensor]:
        """mean, mult and bias, or nothing."""
        return [vector for vector in self[:3] if vector is not None]


@dataclass(frozen=True)
class Epilogue:
    """What every operator ends with: activation, rounding to `outs`, and what follows the first of them.

    bits, next_bits: in which each result is stored. No outs: t itself is the result, fp32.
    """

    activation: str | None
    outs: tuple[Grid, ...]
    bits: tuple[int, ...]
    then: Requantize | None = None
    next_bits: tuple[int, ...] = ()

    def flat(self) -> tuple[str | None, list[float], list[Tensor | None], str | None, list[float]]:
        """As arguments of a torch operator."""
        activation, outs = self.activation, _flat_all(self.outs, self.bits)
        if self.then is None:
            return activation, outs, [], None, []
        return activation, outs, self.then.constants, self.then.activation, _flat_all(self.then.outs, self.next_bits)

    @staticmethod
    def of(
        activation: str | None, outs: Sequence[float], constants: Sequence[Tensor | None],
        then_activation: str | None, nexts: Sequence[float],
    ) -> Epilogue:  # fmt: skip
        """Back from `flat`."""
        grids, bits = _unflat_all(outs)
        if not nexts:
            return Epilogue(activation, grids, bits)
        next_grids, next_bits = _unflat_all(nexts)
        mean, mult, bias, slope, table = constants
        then = Requantize(next_grids, mean, mult, bias, then_activation, slope, table)
        return Epilogue(activation, grids, bits, then, next_bits)

    def byte_wide(self) -> Epilogue:
        """The same with every result in bytes."""
        return replace(self, bits=(8,) * len(self.bits), next_bits=(8,) * len(self.next_bits))

    @property
    def results(self) -> list[tuple[Grid, int]]:
        """The grid and the bits in storage of all integer results, in order."""
        nexts = self.then.outs if self.then else ()
        return list(zip(self.outs + nexts, self.bits + self.next_bits, strict=True))


# an operator's last arguments: `Epilogue.flat`
EPILOGUE = "str? activation, float[] outs, Tensor?[] then, str? then_activation, float[] then_outs"


def flat(grid: Grid, bits: int) -> list[float]:
    """A grid as an argument of a torch operator."""
    return [grid.scale, float(grid.zero_point), float(grid.quant_min), float(grid.quant_max), float(bits)]


def unflat(numbers: Sequence[float]) -> tuple[Grid, int]:
    """Back from `flat`."""
    scale, zero_point, quant_min, quant_max, bits = numbers
    return Grid(scale, int(zero_point), int(quant_min), int(quant_max)), int(bits)


def _flat_all(grids: Sequence[Grid], bits: Sequence[int]) -> list[float]:
    return [number for grid, width in zip(grids, bits, strict=True) for number in flat(grid, width)]


def _unflat_all(numbers: Sequence[float]) -> tuple[tuple[Grid, ...], tuple[int, ...]]:
    pairs = [unflat(numbers[first : first + FLAT]) for first in range(0, len(numbers), FLAT)]
    return tuple(grid for grid, _ in pairs), tuple(bits for _, bits in pairs)


# --- memory -------------------------------------------------------------------------------------------------------


def channels_last(x: Tensor) -> Tensor:
    """`[N, C]` or `[N, C, H, W]` as `[N, C, H, W]`, a pixel's channels side by side."""
    x = x[:, :, None, None] if x.dim() == 2 else x
    return x.contiguous(memory_format=torch.channels_last)


def storage_width(bits: int, channels: int) -> int:
    """The narrowest storage of integers of `bits` bits that fills its bytes: 2, 4 or 8 bits."""
    return next(width for width in reversed(STORED_BITS) if width >= bits and channels % (8 // width) == 0)


def pack_channels(q: Tensor, bits: int) -> Tensor:
    """Integers `[N, C, ...]`, uint8 or int8, in bytes `[N, C bits / 8, ...]`."""
    if bits == 8:
        return q
    fields = (q.to(torch.uint8) & (2**bits - 1)).chunk(8 // bits, dim=1)
    packed = fields[0]
    for place, other in enumerate(fields[1:], 1):
        packed = packed | (other << (place * bits))
    return packed


def unpack_channels(packed: Tensor, bits: int, signed: bool) -> Tensor:
    """Back from `pack_channels`: int8 if signed, else uint8."""
    if bits == 8:
        return packed
    q = torch.cat([(packed >> (place * bits)) & (2**bits - 1) for place in range(8 // bits)], dim=1)
    if not signed:
        return q
    half = 2 ** (bits - 1)
    return ((q ^ half).to(torch.int8) - half).to(torch.int8)


def allocate(like: Tensor, shape: Sequence[int], epilogue: Epilogue) -> list[Tensor]:
    """An operator's results of logical `shape`, not yet written."""
    count, channels, *sides = shape
    if not epilogue.outs:
        return [_empty(like, [count, channels, *sides], torch.float32)]
    return [
        _empty(like, [count, channels * bits // 8, *sides], torch.int8 if grid.signed and bits == 8 else torch.uint8)
        for grid, bits in epilogue.results
    ]


def _empty(like: Tensor, shape: list[int], dtype: torch.dtype) -> Tensor:
    layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device=like.device, memory_format=layout)


def fp32_of(value: float) -> float:
    """The nearest fp32 number."""
    nearest: float = struct.unpack("f", struct.pack("f", value))[0]
    return nearest


def one_or_two(value: int | Sequence[int]) -> list[int]:
    """A side, or one for each axis."""
    return [value, value] if isinstance(value, int) else list(value)
