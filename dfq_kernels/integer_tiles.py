"""What the Triton kernels on integers share: channels in blocks, fields of bytes, and what every operator ends with.

A map is `[pixels, channels]` in memory. A block of B columns holds B / P neighbours of each of P planes of channels
(`integers.py`): whoever writes packed integers then has all fields of a byte. A plane of bytes comes out of four bytes
at once by a shift and a mask.
Launches switch off the fusion of products and sums, because every operation is rounded on its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dfq_kernels.activations import activation_of
from dfq_kernels.integers import Constants, Epilogue, Grid, fp32_of
from dfq_kernels.memory import fp32, optional
from dfq_kernels.tiles import INTERPRETED, tuning

FLOAT = 32  # "bits" of a result that is no integer
SIXTH = tl.constexpr(fp32_of(1 / 6))
MULTIPROCESSORS = 128  # about; a grid that leaves some idle is cut finer
SWAR = not INTERPRETED.value and torch.version.hip is None  # four bytes in a register, by NVIDIA's instructions


class Ending:
    """The last two arguments of a kernel, `first` and `then`, and its compile-time ones, from an epilogue and the
    results' memory. Numbers of activations are values like all others: a kernel serves all of them.

    bits: of the integers that the kernel reads a block of columns of; a block has as many planes as any of them.
    """

    def __init__(self, epilogue: Epilogue, results: list[Tensor], *bits: int) -> None:
        count, then = max(1, len(epilogue.outs)), epilogue.then
        self.arguments: tuple[Any, Any] = (_end(results[:count], epilogue.outs, epilogue.activation), None)
        if then is not None:
            following = _end(results[count:], then.outs, then.activation)
            self.arguments = (self.arguments[0], (*following, meaning(epilogue.outs[0], then.constants)))
        self.planes = 8 // min((8, *bits, *epilogue.bits, *epilogue.next_bits))
        self.constants = {
            "P": self.planes, "ACTIVATION": activation_of(epilogue.activation).code,
            "NEXT_ACTIVATION": activation_of(then.activation).code if then else 0,
            "BITS": epilogue.bits or (FLOAT,), "NEXT_BITS": epilogue.next_bits,
        }  # fmt: skip


def _end(results: Sequence[Tensor], grids: Sequence[Grid], activation: str | None) -> tuple[Any, ...]:
    """Results, the numbers of their grids, those of the activation."""
    known = activation_of(activation)
    numbers = tuple(number for grid in grids for number in _numbers(grid)) or (0.0,)
    return tuple(as_bytes(out) for out in results), numbers, (known.a, known.b)


def meaning(grid: Grid, constants: Sequence[Tensor | None]) -> tuple[Any, ...]:
    """What makes real numbers of a grid's integers, as `meant` reads it: scale, zero point, norm, slope, table; the
    lowest and the highest integer of the table."""
    given = Constants(*constants)
    norm = tuple(fp32(vector) for vector in given.norm) or None
    return (grid.scale, float(grid.zero_point), norm, optional(given.slope), optional(given.table),
            float(grid.quant_min), float(grid.quant_max))  # fmt: skip


def _numbers(grid: Grid) -> tuple[float, float, float, float]:
    """What rounding to a grid needs."""
    return grid.inverse, float(grid.zero_point), float(grid.quant_min), float(grid.quant_max)


def as_bytes(q: Tensor) -> Tensor:
    """Integers as the kernels read and write them; fp32 as it is."""
    return q if q.dtype == torch.float32 else q.view(torch.uint8)


def blocks(pixels: int, channels: int, ending: Ending, taps: int = 1) -> tuple[int, dict[str, int]]:
    """How many programs cover a map, and their compile-time R pixels and B columns; with `taps`, T of them at once.

    A small map is cut finer before processors stay idle: down to an element a thread, with taps to a pixel and 16
    channels. A program has about eight loads of taps in flight, and shares more of them among idle threads.
    """
    chosen, planes = tuning()["pixels"], ending.planes
    threads = 32 * chosen["warps"]
    columns = max(min(chosen["channels"], triton.next_power_of_2(channels)), planes)
    tile = {"R": min(max(1, chosen["elements"] // columns), triton.next_power_of_2(pixels)), "B": columns}

    def programs() -> int:
        return triton.cdiv(pixels, tile["R"]) * triton.cdiv(channels // planes, tile["B"] // planes)

    for side, least in (
        ("R", 1 if taps > 1 else max(1, threads // columns)),
        ("B", 16 * planes if taps > 1 else columns),
    ):
        while tile[side] > least and programs() < MULTIPROCESSORS:
            tile[side] //= 2
    if taps > 1:
        room, whole = tile["R"] * tile["B"], triton.next_power_of_2(taps)
        tile["T"] = min(whole, max(1, chosen["elements"] // room), max(1, threads // room, whole // 8))
    return programs(), tile


# --- channels and fields ------------------------------------------------------------------------------------------


@triton.jit
def columns(block, CHANNELS: tl.constexpr, B: tl.constexpr, P: tl.constexpr):
    """The channels of a block's B columns, and which of them there are."""
    place = tl.arange(0, B)
    inside = block * (B // P) + place % (B // P)
    return place // (B // P) * (CHANNELS // P) + inside, inside < CHANNELS // P


@triton.jit
def place_of(
    program, pixels, CHANNELS: tl.constexpr, R: tl.constexpr, B: tl.constexpr, P: tl.constexpr, T: tl.constexpr = 1
):
    """A program's pixels `[R, 1]` (int64) and channels `[1, B]`, and which of them there are; its block of channels.

    The pixels T times over, where T places of each are looked at together: `[T * R, 1]`.
    """
    COUNT: tl.constexpr = (CHANNELS // P + B // P - 1) // (B // P)
    block = program % COUNT
    pixel = (program // COUNT).to(tl.int64) * R + (tl.arange(0, T * R) % R)[:, None]
    c, known = columns(block, CHANNELS, B, P)
    return pixel, c[None, :], pixel < pixels, known[None, :], block


@triton.jit
def integers(
    x, pixel, c, there, CHANNELS: tl.constexpr, BITS: tl.constexpr, SIGNED: tl.constexpr, B: tl.constexpr,
    P: tl.constexpr,
):  # fmt: skip
    """The integers of channels at pixels, int32; at least as many planes a block as x has."""
    BYTES: tl.constexpr = CHANNELS * BITS // 8
    HALF: tl.constexpr = 1 << (BITS - 1)
    ALIGNED: tl.constexpr = _aligned(CHANNELS // P, B // P)  # what the compiler cannot see behind the remainder
    byte = tl.max_contiguous(tl.multiple_of(c % BYTES, [1, ALIGNED]), [1, ALIGNED])
    q = tl.load(x + pixel * BYTES + byte, mask=there, other=0).to(tl.int32)
    if BITS < 8:
        q = (q >> (c // BYTES * BITS)) & (2 * HALF - 1)
    if SIGNED:
        q = (q ^ HALF) - HALF
    return q


@triton.jit
def real(q, zero, scale):
    """`(q - zero_point) * scale`."""
    return (q.to(tl.float32) - zero) * scale


@triton.jit
def meant(q, c, there, known, meaning):
    """What integers of channels stand for, with a batch norm, a slope, or a table; q: int32, or whole fp32."""
    scale, zero, norm, slope, table, low, high = meaning
    if table is not None:  # an integer beyond the grid is read from the table's end
        place = tl.minimum(tl.maximum(q.to(tl.float32), low), high) - low
        t = tl.load(table + place.to(tl.int32), mask=there, other=0.0)
    else:
        t = real(q, zero, scale)
        if norm is not None:
            t = t - tl.load(norm[0] + c, mask=known, other=0.0)
            t = t * tl.load(norm[1] + c, mask=known, other=0.0) + tl.load(norm[2] + c, mask=known, other=0.0)
        if slope is not None:
            t = tl.where(t > 0, t, tl.load(slope + c, mask=known, other=0.0) * t)
    return t


@triton.jit
def activated(t, numbers, ACTIVATION: tl.constexpr):
    """An activation by its code in `dfq_kernels.activations`."""
    tl.static_assert(ACTIVATION <= 6, "an activation that no kernel knows")
    if ACTIVATION == 1:
        t = tl.maximum(t, 0.0)
    elif ACTIVATION == 2:
        t = tl.minimum(tl.maximum(t, 0.0), 6.0)
    elif ACTIVATION == 3:
        t = tl.minimum(tl.maximum(t, numbers[0]), numbers[1])
    elif ACTIVATION == 4:
        t = tl.where(t > 0, t, t * numbers[0])
    elif ACTIVATION >= 5:
        gate = tl.minimum(tl.maximum(t + 3.0, 0.0), 6.0) * SIXTH
        t = gate if ACTIVATION == 5 else t * gate
    return t


@triton.constexpr_function
def _aligned(channels, columns):
    """Bytes that begin and end together: runs of neighbours start at multiples of it, up to 16."""
    return math.gcd(16, channels, columns)


@triton.constexpr_function
def _repeated(value, bits):
    """A field of `bits` bits in every field of four bytes."""
    return sum(value << place for place in range(0, 32, bits))


@triton.constexpr_function
def _field(k, bits, flip):
    """PTX: the k-th field of each of four bytes, with its highest bit turned where `flip`."""
    turned = _repeated(1 << (bits - 1), bits) if flip else 0
    mask = _repeated((1 << bits) - 1, 8)
    return f"{{ .reg .b32 t; xor.b32 t, $1, {turned}; shr.b32 t, t, {k * bits}; and.b32 $0, t, {mask}; }}"


@triton.constexpr_function
def _weight_field(k, bits):
    """PTX: the k-th field of each of four bytes in its highest bits."""
    mask = _repeated(((1 << bits) - 1) << (8 - bits), 8)
    return f"{{ .reg .b32 t; shl.b32 t, $1, {8 - bits * (k + 1)}; and.b32 $0, t, {mask}; }}"


@triton.jit
def field(x, k: tl.constexpr, BITS: tl.constexpr, SIGNED: tl.constexpr, SWAR: tl.constexpr):
    """The k-th field of bytes as an int8 factor, which is `q + origin(BITS, SIGNED)`."""
    FLIP: tl.constexpr = (BITS == 8) != SIGNED
    HALF: tl.constexpr = 1 << (BITS - 1)
    if BITS == 8 and not FLIP:
        q = x
    elif SWAR:  # the compiler would take the bytes one by one
        q = tl.inline_asm_elementwise(_field(k, BITS, FLIP), "=r,r", [x], tl.uint8, True, 4)
    else:
        q = (x >> (k * BITS)) & (2 * HALF - 1)
        if FLIP:
            q = q ^ HALF
    return q.to(tl.int8, bitcast=True)


def origin(bits: int, signed: bool) -> int:
    """What `field` adds to an integer so that it is an int8 that needs no sign: u8 is moved down, few bits up."""
    if bits == 8:
        return 0 if signed else -128
    return 2 ** (bits - 1) if signed else 0


@triton.jit
def weight_field(w, k: tl.constexpr, BITS: tl.constexpr, SWAR: tl.constexpr):
    """The k-th field of bytes as an int8 factor `q * 2^(8 - BITS)`: the sign is in its place, nothing is spread."""
    if BITS == 8:
        q = w
    elif SWAR:
        q = tl.inline_asm_elementwise(_weight_field(k, BITS), "=r,r", [w], tl.uint8, True, 4)
    else:
        q = (w << (8 - BITS * (k + 1))) & (256 - (1 << (8 - BITS)))
    return q.to(tl.int8, bitcast=True)


# --- ends ---------------------------------------------------------------------------------------------------------


@triton.jit
def rounded(t, numbers, k: tl.constexpr):
    """To the k-th grid, plus 1.5 * 2^23: adding that rounds, and leaves the integer in the lowest bits of the float.

    The clamp comes first, so nothing is too large for it. (No NaN comes here, and one would be quant_min.)
    """
    scaled = t * numbers[4 * k] + numbers[4 * k + 1]
    return tl.minimum(tl.maximum(scaled, numbers[4 * k + 2]), numbers[4 * k + 3]) + 12582912.0


@triton.jit
def keep(
    out, q, pixel, c, rows, known, block,
    CHANNELS: tl.constexpr, R: tl.constexpr, B: tl.constexpr, P: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Writes the lowest bits of a tile of int32; its planes are fields of the same bytes."""
    if BITS == 8:
        tl.store(out + pixel * CHANNELS + c, q.to(tl.uint8), mask=rows & known)
    else:
        N: tl.constexpr = 8 // BITS
        fields = tl.reshape(q & ((1 << BITS) - 1), (R, N, B // N))
        byte = tl.sum(fields << (tl.arange(0, N) * BITS)[None, :, None], 1)
        c, known = columns(block, CHANNELS // N, B // N, P // N)
        tl.store(out + pixel * (CHANNELS // N) + c[None, :], byte.to(tl.uint8), mask=rows & known[None, :])


@triton.jit
def finish(
    t, pixel, c, rows, known, block, first, then,
    CHANNELS: tl.constexpr, R: tl.constexpr, B: tl.constexpr, P: tl.constexpr, ACTIVATION: tl.constexpr,
    NEXT_ACTIVATION: tl.constexpr, BITS: tl.constexpr, NEXT_BITS: tl.constexpr,
):  # fmt: skip
    """Activation, rounding to every result's grid, and what follows the first of them."""
    outs, numbers, activation = first
    t = activated(t, activation, ACTIVATION)
    if BITS[0] == 32:
        tl.store(outs[0] + pixel * CHANNELS + c, t, mask=rows & known)
    else:
        for k in tl.static_range(len(BITS)):
            q = rounded(t, numbers, k).to(tl.int32, bitcast=True)
            keep(outs[k], q, pixel, c, rows, known, block, CHANNELS, R, B, P, BITS[k])
        if len(NEXT_BITS) > 0:
            nexts, next_numbers, activation, meaning = then
            t = meant(rounded(t, numbers, 0) - 12582912.0, c, rows & known, known, meaning)
            t = activated(t, activation, NEXT_ACTIVATION)
            for k in tl.static_range(len(NEXT_BITS)):
                q = rounded(t, next_numbers, k).to(tl.int32, bitcast=True)
                keep(nexts[k], q, pixel, c, rows, known, block, CHANNELS, R, B, P, NEXT_BITS[k])
