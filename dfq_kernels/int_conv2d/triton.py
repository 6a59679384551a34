"""`int_conv2d` in Triton: products of tiles on tensor cores, and a kernel of its own for one channel a group."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from dfq_kernels.int_conv2d import schema
from dfq_kernels.integer_tiles import (
    MULTIPROCESSORS,
    SWAR,
    Ending,
    as_bytes,
    blocks,
    columns,
    field,
    finish,
    integers,
    origin,
    place_of,
    real,
    weight_field,
)
from dfq_kernels.integers import Epilogue, Grid, allocate, channels_last, pack_channels, unflat, unpack_channels
from dfq_kernels.memory import fp32
from dfq_kernels.registration import register
from dfq_kernels.tiles import launch, tuning

LEAST_DEPTH = 32  # bytes of K that int8 tensor cores take at once


@triton.jit
def scaled(
    acc, mult, bias, residual, pixel, c, rows, known, residual_zero, residual_scale,
    CHANNELS: tl.constexpr, R_BITS: tl.constexpr, R_SIGNED: tl.constexpr, B: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """`float(acc) * mult[c] + bias[c] + float(r - z_r) * s_r`."""
    t = acc.to(tl.float32) * tl.load(mult + c, mask=known, other=0.0) + tl.load(bias + c, mask=known, other=0.0)
    if residual is not None:
        r = integers(residual, pixel, c, rows & known, CHANNELS, R_BITS, R_SIGNED, B, P)
        t = t + real(r, residual_zero, residual_scale)
    return t


@triton.jit
def dense_kernel(
    x, weight, sums, mult, bias, residual, pixels, x_origin, pad, residual_zero, residual_scale,
    first, then,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, OUT_HEIGHT: tl.constexpr, OUT_WIDTH: tl.constexpr,
    INNER: tl.constexpr, OUTER: tl.constexpr, GROUPS: tl.constexpr, KY: tl.constexpr, KX: tl.constexpr,
    SY: tl.constexpr, SX: tl.constexpr, PY: tl.constexpr, PX: tl.constexpr, DY: tl.constexpr, DX: tl.constexpr,
    X_BITS: tl.constexpr, X_SIGNED: tl.constexpr, W_BITS: tl.constexpr, R_BITS: tl.constexpr, R_SIGNED: tl.constexpr,
    SWAR: tl.constexpr, ZERO_PAD: tl.constexpr,
    R: tl.constexpr, B: tl.constexpr, K: tl.constexpr, P: tl.constexpr,
    ACTIVATION: tl.constexpr, NEXT_ACTIVATION: tl.constexpr, BITS: tl.constexpr, NEXT_BITS: tl.constexpr,
):  # fmt: skip
    # math     acc = sum over taps and channels of (x - zero_point) * w; t = float(acc) * mult + bias + residual
    # traffic  x and weights read (again from cache for every block of columns), results written
    # grid     one program per R pixels and B output channels of a group
    # block    [R, K] bytes of x times [K, B] bytes of weights; every field of the bytes is one product of tiles
    # order    sums in int32, exact in any order; then every operation rounded on its own
    COUNT: tl.constexpr = (OUTER // P + B // P - 1) // (B // P)
    CHANNELS: tl.constexpr = OUTER * GROUPS
    X_BYTES: tl.constexpr = INNER * GROUPS * X_BITS // 8
    W_BYTES: tl.constexpr = INNER * W_BITS // 8
    PLANES: tl.constexpr = 8 // min(X_BITS, W_BITS)  # of the narrower operand; a run of channels lies in one plane
    RUN: tl.constexpr = INNER // PLANES
    X_RUNS: tl.constexpr = PLANES * X_BITS // 8  # runs of a plane of x
    W_RUNS: tl.constexpr = PLANES * W_BITS // 8
    DEPTH: tl.constexpr = KY * KX * RUN
    PADDED: tl.constexpr = PY > 0 or PX > 0
    if ZERO_PAD:
        pad = 0  # an asynchronous copy fills with zeros by itself; any other byte is patched in, byte by byte
    program = tl.program_id(0)
    block, group = program % COUNT, program // COUNT % GROUPS
    pixel = (program // COUNT // GROUPS).to(tl.int64) * R + tl.arange(0, R)
    rows = pixel < pixels
    inside_group, known = columns(block, OUTER, B, P)
    c = group * OUTER + inside_group
    image = pixel // (OUT_HEIGHT * OUT_WIDTH) * (HEIGHT * WIDTH * X_BYTES)
    place = (pixel % (OUT_HEIGHT * OUT_WIDTH)).to(tl.int32)
    if HEIGHT * WIDTH * X_BYTES >= 2**31:
        place = place.to(tl.int64)
    top, left = place // OUT_WIDTH * SY - PY, place % OUT_WIDTH * SX - PX
    from_x = x + image + group * (INNER * X_BITS // 8)
    from_weight = weight + c.to(tl.int64) * (KY * KX * W_BYTES)
    acc = tl.zeros((R, B), tl.int32)
    for start in range(0, DEPTH, K):
        k = start + tl.arange(0, K)
        tap, inner = k // RUN, k % RUN
        y, at = top[:, None] + (tap // KX * DY)[None, :], left[:, None] + (tap % KX * DX)[None, :]
        there = rows[:, None] & (k < DEPTH)[None, :]
        if PADDED:
            there = there & (y >= 0) & (y < HEIGHT) & (at >= 0) & (at < WIDTH)
        offset = (y * WIDTH + at) * X_BYTES + inner[None, :]
        w_offset = (tap * W_BYTES + inner)[:, None]
        w_there = (k < DEPTH)[:, None] & known[None, :]
        for p in tl.static_range(PLANES):
            a = tl.load(from_x[:, None] + offset + p % X_RUNS * RUN, mask=there, other=pad)
            b = tl.load(from_weight[None, :] + w_offset + p % W_RUNS * RUN, mask=w_there, other=0)
            a = field(a, p // X_RUNS, X_BITS, X_SIGNED, SWAR)
            acc = tl.dot(a, weight_field(b, p // W_RUNS, W_BITS, SWAR), acc, out_dtype=tl.int32)
    acc = (acc >> (8 - W_BITS)) - (x_origin * tl.load(sums + c, mask=known, other=0))[None, :]
    pixel, rows, c, known = pixel[:, None], rows[:, None], c[None, :], known[None, :]
    t = scaled(acc, mult, bias, residual, pixel, c, rows, known, residual_zero, residual_scale,
               CHANNELS, R_BITS, R_SIGNED, B, P)  # fmt: skip
    finish(t, pixel, c, rows, known, block, first, then,
           CHANNELS, R, B, P, ACTIVATION, NEXT_ACTIVATION, BITS, NEXT_BITS)  # fmt: skip


@triton.jit
def depthwise_kernel(
    x, weight, sums, mult, bias, residual, pixels, x_zero, pad, residual_zero, residual_scale,
    first, then,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, OUT_HEIGHT: tl.constexpr, OUT_WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr, KY: tl.constexpr, KX: tl.constexpr,
    SY: tl.constexpr, SX: tl.constexpr, PY: tl.constexpr, PX: tl.constexpr, DY: tl.constexpr, DX: tl.constexpr,
    X_BITS: tl.constexpr, X_SIGNED: tl.constexpr, R_BITS: tl.constexpr, R_SIGNED: tl.constexpr,
    R: tl.constexpr, B: tl.constexpr, P: tl.constexpr, ACTIVATION: tl.constexpr,
    NEXT_ACTIVATION: tl.constexpr, BITS: tl.constexpr, NEXT_BITS: tl.constexpr,
):  # fmt: skip
    # math     acc = sum over taps of (x - zero_point) * w of the same channel; t = float(acc) * mult + bias + residual
    # traffic  x read (its rows again from cache), results written; weights from cache
    # grid     one program per R pixels and B channels
    # order    sums in int32, exact in any order; then every operation rounded on its own
    pixel, c, rows, known, block = place_of(tl.program_id(0), pixels, CHANNELS, R, B, P)
    image = pixel // (OUT_HEIGHT * OUT_WIDTH) * (HEIGHT * WIDTH)
    place = (pixel % (OUT_HEIGHT * OUT_WIDTH)).to(tl.int32)
    top, left = place // OUT_WIDTH * SY - PY, place % OUT_WIDTH * SX - PX
    acc = tl.zeros((R, B), tl.int32)
    for tap in range(KY * KX):
        y, at = top + tap // KX * DY, left + tap % KX * DX
        there = rows & known & (y >= 0) & (y < HEIGHT) & (at >= 0) & (at < WIDTH)
        q = integers(x, image + y * WIDTH + at, c, there, CHANNELS, X_BITS, X_SIGNED, B, P)
        w = tl.load(weight + c * (KY * KX) + tap, mask=known, other=0).to(tl.int8, bitcast=True).to(tl.int32)
        acc += tl.where(there, q - x_zero, 0) * w
    t = scaled(acc, mult, bias, residual, pixel, c, rows, known, residual_zero, residual_scale,
               CHANNELS, R_BITS, R_SIGNED, B, P)  # fmt: skip
    finish(t, pixel, c, rows, known, block, first, then,
           CHANNELS, R, B, P, ACTIVATION, NEXT_ACTIVATION, BITS, NEXT_BITS)  # fmt: skip


def dense_blocks(
    pixels: int, outer: int, groups: int, planes: int, depth: int, fields: int
) -> tuple[int, dict[str, int]]:
    """How many programs there are, and their compile-time R pixels, B columns and K bytes.

    A small map is cut finer before processors stay idle: rows to 32, columns and then rows to the 16 that a product of
    tiles has at least. x is then read once for every block of columns, from cache. Smaller tiles are deeper: a step
    waits for its copies whatever it multiplies.

    depth: bytes of K, each of `fields` integers of an operand.
    """
    chosen = tuning()["convolution"]
    most = chosen["pixels"] // 2 if fields == 4 else chosen["pixels"]  # four products of tiles fill the registers
    tile = {
        "R": min(most, max(16, triton.next_power_of_2(pixels))),
        "B": min(chosen["channels"], max(16, triton.next_power_of_2(outer))),
    }

    def programs() -> int:
        return triton.cdiv(pixels, tile["R"]) * triton.cdiv(outer // planes, tile["B"] // planes) * groups

    for side, least in (("R", 32), ("B", 16), ("R", 16)):
        while tile[side] > least and programs() < MULTIPROCESSORS:
            tile[side] //= 2
    tile["K"] = min(chosen["depth"], max(LEAST_DEPTH, triton.next_power_of_2(depth)))
    memory = (chosen["pixels"] + chosen["channels"]) * chosen["depth"]
    while (tile["R"] + tile["B"]) * tile["K"] * 2 <= memory and tile["K"] * 2 <= depth:
        tile["K"] *= 2
    return programs(), tile


def pad_byte(grid: Grid, bits: int) -> int:
    """A byte all of whose fields are the zero point."""
    return sum((grid.zero_point % 2**bits) << place for place in range(0, 8, bits))


def _unpacked(q: Tensor, bits: int, signed: bool) -> tuple[Tensor, int]:
    return channels_last(unpack_channels(q, bits, signed)), 8


@register(schema.FORWARD, "triton")
def forward(
    x: Tensor, x_grid: list[float], weight: Tensor, sums: Tensor, weight_bits: int, mult: Tensor, bias: Tensor,
    stride: list[int], padding: list[int], dilation: list[int], groups: int, residual: Tensor | None,
    residual_grid: list[float], *flat: Any,
) -> list[Tensor]:  # fmt: skip
    """`t = float(acc) * mult[c] + bias[c] + float(r - z_r) * s_r`, and what every operator ends with."""
    epilogue = Epilogue.of(*flat)
    (grid, bits), shape = unflat(x_grid), schema.out_shape(x, weight, stride, padding, dilation)
    results = allocate(x, shape, epilogue)
    if 0 in shape:
        return results
    channels = x.shape[1] * 8 // bits
    by_channel = groups == channels == weight.shape[0] and groups > 1
    grouped = groups > 1 and not by_channel  # planes cut across groups: their integers are bytes
    if grouped and bits < 8:
        x, bits = _unpacked(x, bits, grid.signed)
    wide = epilogue.byte_wide() if grouped else epilogue
    written = results if wide == epilogue else allocate(x, shape, wide)
    other, other_bits = unflat(residual_grid) if residual is not None else (grid, 8)
    if residual is not None and grouped and other_bits < 8:
        residual, other_bits = _unpacked(residual, other_bits, other.signed)
    x, ending = channels_last(x), Ending(wide, written, other_bits, bits if by_channel else 8)
    pixels, inner, outer = shape[0] * shape[2] * shape[3], channels // groups, shape[1] // groups
    values = (
        x, as_bytes(x), as_bytes(channels_last(weight)), sums, fp32(mult), fp32(bias),
        None if residual is None else as_bytes(channels_last(residual)), pixels,
    )  # fmt: skip
    pad = pad_byte(grid, bits)
    numbers = (pad, float(other.zero_point), other.scale)
    geometry: dict[str, Any] = {
        **dict(zip(("HEIGHT", "WIDTH", "OUT_HEIGHT", "OUT_WIDTH"), (*x.shape[2:], *shape[2:]), strict=True)),
        **dict(zip(("KY", "KX"), weight.shape[2:], strict=True)), **dict(zip(("SY", "SX"), stride, strict=True)),
        **dict(zip(("PY", "PX"), padding, strict=True)), **dict(zip(("DY", "DX"), dilation, strict=True)),
        "X_BITS": bits, "X_SIGNED": grid.signed, "R_BITS": other_bits, "R_SIGNED": other.signed,
    }  # fmt: skip
    if by_channel:
        programs, tile = blocks(pixels, channels, ending)
        launch(
            depthwise_kernel, "pixels", programs, *values, grid.zero_point, *numbers, *ending.arguments,
            CHANNELS=channels, **geometry, **tile, **ending.constants,
        )  # fmt: skip
    else:
        depth = weight.shape[2] * weight.shape[3] * inner * min(bits, weight_bits) // 8
        fields = 8 // min(bits, weight_bits)
        programs, tile = dense_blocks(pixels, outer, groups, ending.planes, depth, fields)
        launch(
            dense_kernel, "convolution", programs, *values, grid.zero_point + origin(bits, grid.signed), *numbers,
            *ending.arguments, INNER=inner, OUTER=outer, GROUPS=groups, W_BITS=weight_bits, SWAR=SWAR,
            ZERO_PAD=pad == 0 or not any(padding), **geometry, **tile, **ending.constants,
        )  # fmt: skip
    for result, out, (_, width) in zip(results, written, epilogue.results, strict=False):
        if result is not out:
            result.copy_(pack_channels(out, width))
    return results
