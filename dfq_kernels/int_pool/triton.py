"""`int_pool` in Triton."""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from dfq_kernels.int_pool import schema
from dfq_kernels.integer_tiles import Ending, as_bytes, blocks, finish, integers, keep, place_of
from dfq_kernels.integers import Epilogue, allocate, channels_last, unflat
from dfq_kernels.registration import register
from dfq_kernels.tiles import launch, quotient


@triton.jit
def window(
    pixel, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, OUT_HEIGHT: tl.constexpr, OUT_WIDTH: tl.constexpr,
    KY: tl.constexpr, KX: tl.constexpr, SY: tl.constexpr, SX: tl.constexpr, PY: tl.constexpr, PX: tl.constexpr,
    ADAPTIVE: tl.constexpr,
):  # fmt: skip
    """The first pixel of a result's image, and its window: top, left, bottom, right; KY, KX: sides of the largest."""
    image = pixel // (OUT_HEIGHT * OUT_WIDTH) * (HEIGHT * WIDTH)
    place = (pixel % (OUT_HEIGHT * OUT_WIDTH)).to(tl.int32)
    row, column = place // OUT_WIDTH, place % OUT_WIDTH
    if ADAPTIVE:
        row, column = row.to(tl.int64), column.to(tl.int64)  # sides of 2^16 multiply to more than 31 bits
        top, left = row * HEIGHT // OUT_HEIGHT, column * WIDTH // OUT_WIDTH
        bottom = ((row + 1) * HEIGHT + OUT_HEIGHT - 1) // OUT_HEIGHT
        right = ((column + 1) * WIDTH + OUT_WIDTH - 1) // OUT_WIDTH
    else:
        top, left = row * SY - PY, column * SX - PX
        bottom, right = top + KY, left + KX
    return image, top, left, bottom, right


@triton.jit
def average_kernel(
    x, pixels, x_zero, x_scale, divisor, first, then,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, OUT_HEIGHT: tl.constexpr, OUT_WIDTH: tl.constexpr,
    KY: tl.constexpr, KX: tl.constexpr, SY: tl.constexpr, SX: tl.constexpr, PY: tl.constexpr, PX: tl.constexpr,
    ADAPTIVE: tl.constexpr, PADDED: tl.constexpr, X_BITS: tl.constexpr, X_SIGNED: tl.constexpr, CHANNELS: tl.constexpr,
    T: tl.constexpr, R: tl.constexpr, B: tl.constexpr, P: tl.constexpr, ACTIVATION: tl.constexpr,
    NEXT_ACTIVATION: tl.constexpr, BITS: tl.constexpr, NEXT_BITS: tl.constexpr,
):  # fmt: skip
    # math     t = float(sum over the window of (x - zero_point)) * (scale / count)
    # count    divisor; else the window's places that lie in the map, or in the padded map (PADDED)
    # traffic  x read, results written
    # grid     one program per R pixels of the result and B channels
    # block    T places of every window at once: few pixels have many, and a program waits for its loads once
    # order    sums in int32, exact in any order; then every operation rounded on its own
    program = tl.program_id(0)
    pixel, c, rows, known, _ = place_of(program, pixels, CHANNELS, R, B, P, T)
    image, top, left, bottom, right = window(
        pixel, HEIGHT, WIDTH, OUT_HEIGHT, OUT_WIDTH, KY, KX, SY, SX, PY, PX, ADAPTIVE
    )
    acc = tl.zeros((T * R, B), tl.int32)
    for start in range(0, KY * KX, T):
        tap = start + (tl.arange(0, T * R) // R)[:, None]
        y, at = top + tap // KX, left + tap % KX
        there = rows & known & (y >= 0) & (y < tl.minimum(bottom, HEIGHT)) & (at >= 0) & (at < tl.minimum(right, WIDTH))
        q = integers(x, image + y * WIDTH + at, c, there, CHANNELS, X_BITS, X_SIGNED, B, P)
        acc += tl.where(there, q - x_zero, 0)
    total = tl.sum(tl.reshape(acc, (T, R, B)), 0)
    pixel, c, rows, known, block = place_of(program, pixels, CHANNELS, R, B, P)
    _, top, left, bottom, right = window(pixel, HEIGHT, WIDTH, OUT_HEIGHT, OUT_WIDTH, KY, KX, SY, SX, PY, PX, ADAPTIVE)
    if divisor is None:
        if PADDED:
            bottom, right = tl.minimum(bottom, HEIGHT + PY), tl.minimum(right, WIDTH + PX)
        else:
            top, left = tl.maximum(top, 0), tl.maximum(left, 0)
            bottom, right = tl.minimum(bottom, HEIGHT), tl.minimum(right, WIDTH)
        count = ((bottom - top) * (right - left)).to(tl.float32)
    else:
        count = tl.zeros((R, 1), tl.float32) + divisor
    t = total.to(tl.float32) * quotient(tl.zeros((R, 1), tl.float32) + x_scale, count)
    finish(t, pixel, c, rows, known, block, first, then,
           CHANNELS, R, B, P, ACTIVATION, NEXT_ACTIVATION, BITS, NEXT_BITS)  # fmt: skip


@triton.jit
def max_kernel(
    x, out, pixels,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, OUT_HEIGHT: tl.constexpr, OUT_WIDTH: tl.constexpr,
    KY: tl.constexpr, KX: tl.constexpr, SY: tl.constexpr, SX: tl.constexpr, PY: tl.constexpr, PX: tl.constexpr,
    DY: tl.constexpr, DX: tl.constexpr, ADAPTIVE: tl.constexpr, X_BITS: tl.constexpr, X_SIGNED: tl.constexpr,
    CHANNELS: tl.constexpr, T: tl.constexpr, R: tl.constexpr, B: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    # math     the largest integer of each window
    # traffic  x read, the result written
    # grid     one program per R pixels of the result and B channels
    # block    T places of every window at once
    # order    exact in any order
    program = tl.program_id(0)
    pixel, c, rows, known, _ = place_of(program, pixels, CHANNELS, R, B, P, T)
    image, top, left, bottom, right = window(
        pixel, HEIGHT, WIDTH, OUT_HEIGHT, OUT_WIDTH, KY, KX, SY, SX, PY, PX, ADAPTIVE
    )
    largest = tl.full((T * R, B), -128, tl.int32)
    for start in range(0, KY * KX, T):
        tap = start + (tl.arange(0, T * R) // R)[:, None]
        y, at = top + tap // KX * DY, left + tap % KX * DX
        there = rows & known & (y >= 0) & (y < HEIGHT) & (at >= 0) & (at < WIDTH) & (tap < KY * KX)
        if ADAPTIVE:
            there = there & (y < bottom) & (at < right)
        q = integers(x, image + y * WIDTH + at, c, there, CHANNELS, X_BITS, X_SIGNED, B, P)
        largest = tl.maximum(largest, tl.where(there, q, -128))
    found = tl.max(tl.reshape(largest, (T, R, B)), 0)
    pixel, c, rows, known, block = place_of(program, pixels, CHANNELS, R, B, P)
    keep(out, found, pixel, c, rows, known, block, CHANNELS, R, B, P, X_BITS)


@register(schema.FORWARD, "triton")
def forward(
    x: Tensor, x_grid: list[float], mode: str, kernel: list[int], stride: list[int], padding: list[int],
    dilation: list[int], ceil_mode: bool, output_size: list[int], count_include_pad: bool, divisor: int, *flat: Any,
) -> list[Tensor]:  # fmt: skip
    """Average: sums, scaled, and what every operator ends with. Max: integers."""
    epilogue, (grid, bits) = Epilogue.of(*flat), unflat(x_grid)
    shape = schema.out_shape(x, bits, kernel, stride, padding, dilation, ceil_mode, output_size)
    results = allocate(x, shape, epilogue)
    if 0 in shape:
        return results
    x, ending, pixels = channels_last(x), Ending(epilogue, results, bits), shape[0] * shape[2] * shape[3]
    if output_size:
        kernel = schema.largest_window(x.shape[2:], output_size)
    programs, tile = blocks(pixels, shape[1], ending, math.prod(kernel))
    tile.setdefault("T", 1)
    geometry = {
        **dict(zip(("HEIGHT", "WIDTH", "OUT_HEIGHT", "OUT_WIDTH"), (*x.shape[2:], *shape[2:]), strict=True)),
        **dict(zip(("KY", "KX"), kernel, strict=True)), **dict(zip(("SY", "SX"), stride, strict=True)),
        **dict(zip(("PY", "PX"), padding, strict=True)), "X_BITS": bits, "X_SIGNED": grid.signed, "CHANNELS": shape[1],
    }  # fmt: skip
    if mode == "max":
        launch(
            max_kernel, "pixels", programs, x, as_bytes(x), as_bytes(results[0]), pixels,
            DY=dilation[0], DX=dilation[1], ADAPTIVE=bool(output_size), **geometry, **tile, P=ending.planes,
        )  # fmt: skip
        return results
    launch(
        average_kernel, "pixels", programs, x, as_bytes(x), pixels, grid.zero_point, grid.scale,
        float(divisor) if divisor else None, *ending.arguments, ADAPTIVE=bool(output_size), PADDED=count_include_pad,
        **geometry, **tile, **ending.constants,
    )  # fmt: skip
    return results
