"""What the Triton kernels share: tensors cut into tiles, the arithmetic of one element, sums, launches.

A dense tensor `[outer, channels, inner]` is cut into units: one channel each where a channel's elements lie side by
side (NCHW, or one scale for the whole tensor), `W` neighbouring channels where they do not (channels-last). A unit's
elements are tiles of `R` images by `W` neighbours, counted by steps; a reduction gives every slice of steps to a
program, and a second kernel joins the slices in order: the same bits whatever runs first.

Nothing here is of one vendor: rounding is arithmetic, not a library's. Division and square root round to nearest, but
for the divisions inside of a slice's statistics and of the loss, which have a bound anyway. Nothing is fused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# a reduction is spread over at most so many; the order of sums depends on it and on the launch configuration alone
PROGRAMS = 1024
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@dataclass(frozen=True)
class Tiles:
    """How a dense tensor is cut: what every kernel over channels is launched with."""

    outer: int
    channels: int
    inner: int
    by_channel: bool
    rows: int
    width: int
    elements: int

    @staticmethod
    def of(view: tuple[int, int, int], elements: int) -> Tiles:
        """Tiles of at most about `elements`, a power of two."""
        size, channels, inner = view
        outer, by_channel = size // (channels * inner), channels == 1 or inner > 1
        whole = triton.next_power_of_2(outer) * triton.next_power_of_2(inner)
        small = by_channel and whole <= elements  # one tile, whatever it pads
        width = triton.next_power_of_2(inner) if small else _width(inner if by_channel else channels, elements)
        width = min(width, elements)
        rows = min(elements // width, triton.next_power_of_2(outer))
        return Tiles(outer, channels, inner, by_channel, rows, width, elements)

    @property
    def units(self) -> int:
        return self.channels if self.by_channel else triton.cdiv(self.channels, self.width)

    @property
    def steps(self) -> int:
        """Tiles of one unit."""
        return triton.cdiv(self.outer, self.rows) * (triton.cdiv(self.inner, self.width) if self.by_channel else 1)

    @property
    def slices(self) -> int:
        """Programs that share one unit's steps in a reduction: at most as many as there are whole tiles to share."""
        share = triton.cdiv(self.outer * self.inner, self.elements // (1 if self.by_channel else self.width))
        return min(self.steps, share, max(1, PROGRAMS // self.units))

    def __iter__(self) -> Iterator[int]:
        """The arguments `outer, channels, inner, steps` of a kernel."""
        return iter((self.outer, self.channels, self.inner, self.steps))

    @property
    def shape(self) -> dict[str, Any]:
        """Its compile-time arguments."""
        index = tl.int32 if max(self.outer, self.inner) + self.elements < 2**31 else tl.int64
        return {"R": self.rows, "W": self.width, "BY_CHANNEL": self.by_channel, "INDEX": index}


def _width(neighbours: int, elements: int) -> int:
    """The widest power of two that pads `neighbours` least."""
    whole = triton.next_power_of_2(neighbours)
    widths = [1 << bit for bit in range(5, 31) if 1 << bit <= min(whole, elements)] or [whole]
    return min(widths, key=lambda width: (triton.cdiv(neighbours, width) * width, -width))


# --- launches -----------------------------------------------------------------------------------------------------


FOLDER = Path(__file__).parent / "tuning"


def architecture() -> str:
    """The name of this GPU's file of launch configurations."""
    if torch.version.hip:
        return torch.cuda.get_device_properties().gcnArchName.partition(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability())


@cache
def tuning() -> dict[str, dict[str, int]]:
    """Per kind of kernel the sides of a tile and the warps of a program: of this architecture, or the defaults."""
    chosen = json.loads((FOLDER / "default.json").read_text())
    own = FOLDER / f"{architecture()}.json" if torch.cuda.is_available() else None
    return chosen | json.loads(own.read_text()) if own and own.exists() else chosen


def elements(kernel: str) -> int:
    """Elements of a tile."""
    return tuning()[kernel]["elements"]


def options(name: str) -> dict[str, Any]:
    """What kernels of this kind are compiled with."""
    chosen = tuning()[name]
    stages = {"num_stages": chosen["stages"]} if "stages" in chosen else {}
    return {"num_warps": chosen["warps"], "enable_fp_fusion": False, **stages}


def launch(kernel: Any, name: str, programs: int, like: Tensor, /, *arguments: Any, **compile_time: Any) -> None:
    """Queues `kernel` on the device of `like`; `name` says whose launch configuration it takes."""
    with _on(like):
        kernel[(programs,)](*arguments, **compile_time, **options(name))


def finish(kernel: Any, tiles: Tiles, parts: Tensor, *arguments: Any, **compile_time: Any) -> None:
    """Queues a kernel that joins the slices' `parts`, some channels a program."""
    slices = triton.next_power_of_2(tiles.slices)
    block = max(1, min(triton.next_power_of_2(tiles.channels), elements("finish") // slices))
    programs = triton.cdiv(tiles.channels, block)
    launch(kernel, "finish", programs, parts, parts, *arguments, tiles.channels, tiles.slices, S=slices, BLOCK=block,
           **compile_time)  # fmt: skip


@contextmanager
def _on(x: Tensor) -> Iterator[None]:
    """Triton launches on the current device."""
    if not x.is_cuda:
        yield
        return
    with torch.cuda.device(x.device):
        yield


# --- arithmetic of one element ------------------------------------------------------------------------------------


@triton.jit
def rne(x):
    """To the nearest integer, ties to even, for every float: 2^23 has no fraction left, so adding it rounds."""
    size = tl.abs(x)
    rounded = (size + 8388608.0) - 8388608.0
    return tl.where(size < 8388608.0, tl.where(x < 0, -rounded, rounded), x)


@triton.jit
def round_to(x, low, high, WIDE: tl.constexpr):
    """`(r, clamp(r, low, high))`: r is x's nearest integer where that lies within the bounds, else beyond them, too.

    1.5 * 2^23 has no fraction left for any x below 2^22 in size, of either sign; what is larger stays so.
    """
    rounded = rne(x) if WIDE else (x + 12582912.0) - 12582912.0
    return rounded, clamp(rounded, low, high)


def wide(quant_min: int, quant_max: int) -> bool:
    """Whether bounds leave what one addition rounds."""
    return max(-quant_min, quant_max) >= 2**22


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """To nearest even, as every GPU does; Triton's interpreter cuts bf16 off, so there it is done by hand."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), 0x7FC00000)
        narrowed = (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        narrowed = x.to(dtype)
    return narrowed


@triton.jit
def clamp(x, low, high):
    """NaN stays NaN."""
    return least(most(x, low), high)


@triton.jit
def quotient(a, b):
    """`a / b` rounded to nearest; a: a tensor, b: of its shape or one number."""
    return tl.div_rn(a, tl.where(a == a, b, a))


@triton.jit
def reciprocal(x):
    return tl.div_rn(tl.where(x > 0, 1.0, float("nan")), x)  # no result hides a learned scale that is not above 0


@triton.jit
def inverse_deviation(var, eps):
    return reciprocal(tl.sqrt_rn(var + eps))


@triton.jit
def activate(y, ACTIVATION: tl.constexpr):
    tl.static_assert(ACTIVATION <= 2, "an activation that no kernel knows")
    if ACTIVATION >= 1:
        y = most(y, 0.0)
    if ACTIVATION == 2:
        y = least(y, 6.0)
    return y


@triton.jit
def behind_activation(grad, y, ACTIVATION: tl.constexpr):
    """The gradient behind the activation, whose output is y: 0 where it clipped."""
    if ACTIVATION >= 1:
        grad = tl.where(y <= 0, 0.0, grad)
    if ACTIVATION == 2:
        grad = tl.where(y >= 6, 0.0, grad)
    return grad


@triton.jit
def learned_gradient(x, grad, inv, zero_point, low, high, WIDE: tl.constexpr):
    """Of x, of scale, and the gradient where the clamp changed something."""
    scaled = x * inv
    rounded, q = round_to(scaled + zero_point, low, high, WIDE)
    inside = q == rounded
    grad_inside = tl.where(inside, grad, 0.0)
    error = (q - zero_point) - tl.where(inside, scaled, 0.0)
    return grad_inside, error * grad, grad - grad_inside


# --- tiles --------------------------------------------------------------------------------------------------------


@triton.jit
def channels_of(unit, W: tl.constexpr, BY_CHANNEL: tl.constexpr):
    """The channels of a unit: one, or W neighbours."""
    if BY_CHANNEL:
        c = unit + tl.arange(0, 1)
    else:
        c = unit * W + tl.arange(0, W)
    return c


@triton.jit
def first_step(slice, steps, slices):
    """Where a slice of a unit's steps begins, and the one before it ends."""
    return (slice.to(tl.int64) * steps // slices).to(tl.int32)


@triton.jit
def tile(
    unit, step, outer, channels, inner,
    R: tl.constexpr, W: tl.constexpr, BY_CHANNEL: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Offsets of a unit's elements `[R, W]`, and which of them there are; INDEX holds the larger side and a tile."""
    if BY_CHANNEL:
        pieces = (inner - 1) // W + 1  # not inner + W - 1, which may be too large for 32 bits
        n = tl.cast(step // pieces, INDEX) * R + tl.arange(0, R)
        i = tl.cast(step % pieces, INDEX) * W + tl.arange(0, W)
        offsets = (n.to(tl.int64)[:, None] * channels + unit) * inner + i[None, :]
        there = (n < outer)[:, None] & (i < inner)[None, :]
    else:
        n = tl.cast(step, INDEX) * R + tl.arange(0, R)
        c = unit * W + tl.arange(0, W)
        offsets = n.to(tl.int64)[:, None] * channels + c[None, :]
        there = (n < outer)[:, None] & (c < channels)[None, :]
    return offsets, there


@triton.jit
def of_channels(values, c, channels, DEFAULT: tl.constexpr, GIVEN: tl.constexpr):
    """A number per channel, shaped to meet a tile; DEFAULT where the tensor is not given."""
    if GIVEN:
        given = tl.load(values + c, mask=c < channels, other=DEFAULT).to(tl.float32)
    else:
        given = tl.full((c.shape[0],), DEFAULT, tl.float32)
    return given[None, :]


@triton.jit
def fold(values, BY_CHANNEL: tl.constexpr):
    """The sum of a tile's values for every channel of the unit."""
    total = tl.sum(values, 0)
    if BY_CHANNEL:
        total = tl.sum(total, 0, keep_dims=True)
    return total


@triton.jit
def keep_part(parts, k: tl.constexpr, slice, slices, c, channels, value):
    """The k-th number of a slice, for every channel of the unit."""
    tl.store(parts + (k * slices + slice).to(tl.int64) * channels + c, value, mask=c < channels)


@triton.jit
def parts_of(parts, k: tl.constexpr, slices, c, channels, S: tl.constexpr, DEFAULT: tl.constexpr):
    """The k-th number of all slices, `[S, channels of the unit]`, DEFAULT where there is no slice."""
    at = tl.arange(0, S)
    there = (at < slices)[:, None] & (c < channels)[None, :]
    return tl.load(parts + (k * slices + at).to(tl.int64)[:, None] * channels + c[None, :], mask=there, other=DEFAULT)


@triton.jit
def total_of(parts, k: tl.constexpr, slices, c, channels, S: tl.constexpr):
    """The sum of the k-th number over all slices, in double."""
    return tl.sum(parts_of(parts, k, slices, c, channels, S, 0.0).to(tl.float64), 0).to(tl.float32)


# --- moments: count, mean and sum of squared deviations. Source: Chan, Golub, LeVeque 1983, eq. 2.1 ----------------


@triton.jit
def take(count, mean, squares, value, there):
    """One more value in every lane."""
    count = tl.where(there, count + 1.0, count)
    delta = value - mean
    moved = tl.where(tl.abs(mean) < float("inf"), mean + delta / tl.maximum(count, 1.0), mean + value)
    mean = tl.where(there, moved, mean)
    squares = tl.where(there, squares + delta * (value - mean), squares)
    return count, mean, squares


@triton.jit
def keep_moments(parts, slice, slices, c, channels, count, mean, squares, BY_CHANNEL: tl.constexpr):
    """A slice's lanes joined: parts 0, 1 and 2."""
    total = tl.maximum(fold(count, BY_CHANNEL), 1.0)
    joined = fold(count * mean, BY_CHANNEL) / total
    delta = mean - joined[None, :]
    keep_part(parts, 0, slice, slices, c, channels, fold(count, BY_CHANNEL))
    keep_part(parts, 1, slice, slices, c, channels, joined)
    keep_part(parts, 2, slice, slices, c, channels, fold(squares + count * delta * delta, BY_CHANNEL))


@triton.jit
def moments_of(parts, slices, c, channels, S: tl.constexpr):
    """Mean and biased variance from the slices' moments."""
    count = parts_of(parts, 0, slices, c, channels, S, 0.0)
    mean = parts_of(parts, 1, slices, c, channels, S, 0.0)
    total = tl.sum(count, 0)
    joined = quotient(tl.sum(count * mean, 0), total)
    delta = mean - joined[None, :]
    squares = tl.sum(parts_of(parts, 2, slices, c, channels, S, 0.0) + count * delta * delta, 0)
    return joined, quotient(squares, total)


@triton.jit
def pivot_of(x, c, channels, inner):
    """A channel's first element: moments are taken about it, so that a mean far from 0 costs no digits (but an outlier
    there costs some of the mean's)."""
    first = tl.load(x + c.to(tl.int64) * inner, mask=c < channels, other=0.0).to(tl.float32)
    return tl.where(tl.abs(first) < float("inf"), first, 0.0)  # and not NaN


# --- extremes: a NaN makes both NaN -------------------------------------------------------------------------------


@triton.jit
def least(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def most(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def least_of(values, KEEP: tl.constexpr = False):
    """Along the first axis."""
    numbers = tl.min(tl.where(values == values, values, float("inf")), 0, keep_dims=KEEP)
    return tl.where(tl.max((values != values).to(tl.int32), 0, keep_dims=KEEP) == 1, float("nan"), numbers)


@triton.jit
def most_of(values, KEEP: tl.constexpr = False):
    """Along the first axis."""
    numbers = tl.max(tl.where(values == values, values, float("-inf")), 0, keep_dims=KEEP)
    return tl.where(tl.max((values != values).to(tl.int32), 0, keep_dims=KEEP) == 1, float("nan"), numbers)


@triton.jit
def fold_least(values, BY_CHANNEL: tl.constexpr):
    """The least of a tile's values for every channel of the unit."""
    found = least_of(values)
    return least_of(found, True) if BY_CHANNEL else found


@triton.jit
def fold_most(values, BY_CHANNEL: tl.constexpr):
    """The largest of a tile's values for every channel of the unit."""
    found = most_of(values)
    return most_of(found, True) if BY_CHANNEL else found
