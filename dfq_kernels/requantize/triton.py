"""`requantize` in Triton."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from dfq_kernels.integer_tiles import Ending, as_bytes, blocks, finish, integers, meaning, meant, place_of, real
from dfq_kernels.integers import Epilogue, allocate, channels_last, unflat
from dfq_kernels.registration import register
from dfq_kernels.requantize import schema
from dfq_kernels.tiles import launch


@triton.jit
def requantize_kernel(
    x, meaning, other, pixels, sides, other_zero, other_scale, product_scale, first, then,
    X_BITS: tl.constexpr, X_SIGNED: tl.constexpr, OTHER_BITS: tl.constexpr, OTHER_SIGNED: tl.constexpr,
    BY_CHANNEL: tl.constexpr, BY_PIXEL: tl.constexpr,
    CHANNELS: tl.constexpr, R: tl.constexpr, B: tl.constexpr, P: tl.constexpr, ACTIVATION: tl.constexpr,
    NEXT_ACTIVATION: tl.constexpr, BITS: tl.constexpr, NEXT_BITS: tl.constexpr,
):  # fmt: skip
    # math     t = what x means + (other - its zero) * its scale; or float((x - x_zero) * (other - its zero)) * scale
    # traffic  x and other read once, the results written
    # grid     one program per R pixels and B channels
    # order    every operation rounded on its own
    pixel, c, rows, known, block = place_of(tl.program_id(0), pixels, CHANNELS, R, B, P)
    q = integers(x, pixel, c, rows & known, CHANNELS, X_BITS, X_SIGNED, B, P)
    if other is None:
        t = meant(q, c, rows & known, known, meaning)
    else:
        if BY_PIXEL:
            r = integers(other, pixel, c * 0, rows & known, 1, OTHER_BITS, OTHER_SIGNED, 1, 1)
        else:
            at = pixel // sides if BY_CHANNEL else pixel
            r = integers(other, at, c, rows & known, CHANNELS, OTHER_BITS, OTHER_SIGNED, B, P)
        if product_scale is None:
            t = meant(q, c, rows & known, known, meaning) + real(r, other_zero, other_scale)
        else:  # products of two integers of 8 bits are exact in fp32
            t = (q.to(tl.float32) - meaning[1]) * (r.to(tl.float32) - other_zero) * product_scale
    finish(t, pixel, c, rows, known, block, first, then,
           CHANNELS, R, B, P, ACTIVATION, NEXT_ACTIVATION, BITS, NEXT_BITS)  # fmt: skip


@register(schema.FORWARD, "triton")
def forward(
    x: Tensor, x_grid: list[float], constants: Sequence[Tensor | None], other: Tensor | None, other_grid: list[float],
    product_scale: float | None, *flat: Any,
) -> list[Tensor]:  # fmt: skip
    """What x stands for, plus or times what `other` stands for."""
    epilogue = Epilogue.of(*flat)
    grid, bits = unflat(x_grid)
    others, other_bits = unflat(other_grid) if other is not None else (grid, bits)
    results = allocate(x, (x.shape[0], x.shape[1] * 8 // bits, *x.shape[2:]), epilogue)
    x, ending = channels_last(x), Ending(epilogue, results, bits, other_bits)
    pixels, channels = x.shape[0] * x.shape[2] * x.shape[3], x.shape[1] * 8 // bits
    if pixels:
        programs, shape = blocks(pixels, channels, ending)
        launch(
            requantize_kernel, "pixels", programs, x, as_bytes(x), meaning(grid, constants),
            None if other is None else as_bytes(channels_last(other)), pixels, x.shape[2] * x.shape[3],
            float(others.zero_point), others.scale, product_scale, *ending.arguments, X_BITS=bits,
            X_SIGNED=grid.signed, OTHER_BITS=other_bits, OTHER_SIGNED=others.signed,
            **_shape_of(other, other_bits, x, channels), CHANNELS=channels, **shape, **ending.constants,
        )  # fmt: skip
    return results


def _shape_of(other: Tensor | None, bits: int, x: Tensor, channels: int) -> dict[str, bool]:
    """Whether it has one number for all pixels, or for all channels."""
    if other is None:
        return {"BY_CHANNEL": False, "BY_PIXEL": False}
    all_channels = other.shape[1] * 8 // bits == channels
    return {"BY_CHANNEL": all_channels and other.shape[2:].numel() != x.shape[2:].numel(), "BY_PIXEL": not all_channels}
