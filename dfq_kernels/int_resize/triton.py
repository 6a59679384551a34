"""`int_resize` in Triton."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from dfq_kernels.int_resize import schema
from dfq_kernels.integer_tiles import Ending, as_bytes, blocks, finish, integers, place_of
from dfq_kernels.integers import Epilogue, allocate, channels_last, unflat
from dfq_kernels.memory import fp32
from dfq_kernels.registration import register
from dfq_kernels.tiles import launch


@triton.jit
def between(
    x, row, left, right, across, zero, c, there, CHANNELS: tl.constexpr, X_BITS: tl.constexpr, X_SIGNED: tl.constexpr,
    B: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Along a row, whose first pixel is `row`: `a[left] * (1 - across) + a[right] * across`."""
    a = integers(x, row + left, c, there, CHANNELS, X_BITS, X_SIGNED, B, P).to(tl.float32) - zero
    b = integers(x, row + right, c, there, CHANNELS, X_BITS, X_SIGNED, B, P).to(tl.float32) - zero
    return a * (1.0 - across) + b * across


@triton.jit
def resize_kernel(
    x, rows_of, row_weights, columns_of, column_weights, pixels, x_zero, x_scale, first, then,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, OUT_HEIGHT: tl.constexpr, OUT_WIDTH: tl.constexpr,
    X_BITS: tl.constexpr, X_SIGNED: tl.constexpr, CHANNELS: tl.constexpr,
    R: tl.constexpr, B: tl.constexpr, P: tl.constexpr, ACTIVATION: tl.constexpr,
    NEXT_ACTIVATION: tl.constexpr, BITS: tl.constexpr, NEXT_BITS: tl.constexpr,
):  # fmt: skip
    # math     along both rows, then between them: a * (1 - l) + b * l; t = that * scale
    # traffic  x read (again from cache), results written; places and weights from cache
    # grid     one program per R pixels of the result and B channels
    # order    every operation rounded on its own
    pixel, c, rows, known, block = place_of(tl.program_id(0), pixels, CHANNELS, R, B, P)
    place = (pixel % (OUT_HEIGHT * OUT_WIDTH)).to(tl.int32)
    y, at = place // OUT_WIDTH, place % OUT_WIDTH
    left, right = tl.load(columns_of + at, mask=rows, other=0), tl.load(columns_of + OUT_WIDTH + at, mask=rows, other=0)
    top, bottom = tl.load(rows_of + y, mask=rows, other=0), tl.load(rows_of + OUT_HEIGHT + y, mask=rows, other=0)
    across, down = tl.load(column_weights + at, mask=rows, other=0.0), tl.load(row_weights + y, mask=rows, other=0.0)
    image = pixel // (OUT_HEIGHT * OUT_WIDTH) * (HEIGHT * WIDTH)
    upper = between(x, image + top * WIDTH, left, right, across, x_zero, c, rows & known,
                    CHANNELS, X_BITS, X_SIGNED, B, P)  # fmt: skip
    lower = between(x, image + bottom * WIDTH, left, right, across, x_zero, c, rows & known,
                    CHANNELS, X_BITS, X_SIGNED, B, P)  # fmt: skip
    t = (upper * (1.0 - down) + lower * down) * x_scale
    finish(t, pixel, c, rows, known, block, first, then,
           CHANNELS, R, B, P, ACTIVATION, NEXT_ACTIVATION, BITS, NEXT_BITS)  # fmt: skip


@register(schema.FORWARD, "triton")
def forward(
    x: Tensor, x_grid: list[float], rows: Tensor, row_weights: Tensor, columns: Tensor, column_weights: Tensor,
    *flat: Any,
) -> list[Tensor]:  # fmt: skip
    """Along rows, then along columns, then times the scale, and what every operator ends with."""
    epilogue, (grid, bits) = Epilogue.of(*flat), unflat(x_grid)
    shape = schema.out_shape(x, bits, rows, columns)
    results = allocate(x, shape, epilogue)
    if 0 in shape:
        return results
    x, ending, pixels = channels_last(x), Ending(epilogue, results, bits), shape[0] * shape[2] * shape[3]
    programs, tile = blocks(pixels, shape[1], ending)
    launch(
        resize_kernel, "pixels", programs, x, as_bytes(x), rows.contiguous(), fp32(row_weights), columns.contiguous(),
        fp32(column_weights), pixels, float(grid.zero_point), grid.scale, *ending.arguments,
        HEIGHT=x.shape[2], WIDTH=x.shape[3], OUT_HEIGHT=shape[2], OUT_WIDTH=shape[3], X_BITS=bits,
        X_SIGNED=grid.signed, CHANNELS=shape[1], **tile, **ending.constants,
    )  # fmt: skip
    return results
