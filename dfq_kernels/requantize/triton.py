"""`requantize` in Triton."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from dfq_kernels.integer_tiles import Ending, as_bytes, blocks, finish, integers, place_of, real
from dfq_kernels.integers import Epilogue, allocate, channels_last, unflat
from dfq_kernels.memory import fp32
from dfq_kernels.registration import register
from dfq_kernels.requantize import schema
from dfq_kernels.tiles import launch


@triton.jit
def requantize_kernel(
    x, norm, other, pixels, x_zero, x_scale, other_zero, other_scale,
    outs, numbers, nexts, next_numbers, scale, zero, mean, factor, shift,
    X_BITS: tl.constexpr, X_SIGNED: tl.constexpr, OTHER_BITS: tl.constexpr, OTHER_SIGNED: tl.constexpr,
    CHANNELS: tl.constexpr, R: tl.constexpr, B: tl.constexpr, P: tl.constexpr, ACTIVATION: tl.constexpr,
    NEXT_ACTIVATION: tl.constexpr, BITS: tl.constexpr, NEXT_BITS: tl.constexpr,
):  # fmt: skip
    # math     t = (x - x_zero) * x_scale; t = (t - mean[c]) * mult[c] + bias[c]; t += (other - its zero) * its scale
    # traffic  x and other read once, the results written
    # grid     one program per R pixels and B channels
    # order    every operation rounded on its own
    pixel, c, rows, known, block = place_of(tl.program_id(0), pixels, CHANNELS, R, B, P)
    t = real(integers(x, pixel, c, rows & known, CHANNELS, X_BITS, X_SIGNED, B, P), x_zero, x_scale)
    if norm is not None:
        t = t - tl.load(norm[0] + c, mask=known, other=0.0)
        t = t * tl.load(norm[1] + c, mask=known, other=0.0) + tl.load(norm[2] + c, mask=known, other=0.0)
    if other is not None:
        q = integers(other, pixel, c, rows & known, CHANNELS, OTHER_BITS, OTHER_SIGNED, B, P)
        t = t + real(q, other_zero, other_scale)
    finish(t, pixel, c, rows, known, block, outs, numbers, nexts, next_numbers, scale, zero, mean, factor, shift,
           CHANNELS, R, B, P, ACTIVATION, NEXT_ACTIVATION, BITS, NEXT_BITS)  # fmt: skip


@register(schema.FORWARD, "triton")
def forward(
    x: Tensor, x_grid: list[float], norm: Sequence[Tensor], other: Tensor | None, other_grid: list[float],
    activation: str | None, outs: list[float], then: list[Tensor], then_activation: str | None, then_outs: list[float],
) -> list[Tensor]:  # fmt: skip
    """What x stands for, normalised, plus what `other` stands for."""
    epilogue = Epilogue.of(activation, outs, then, then_activation, then_outs)
    grid, bits = unflat(x_grid)
    others, other_bits = unflat(other_grid) if other is not None else (grid, bits)
    results = allocate(x, (x.shape[0], x.shape[1] * 8 // bits, *x.shape[2:]), epilogue)
    x, ending = channels_last(x), Ending(epilogue, results, bits, other_bits)
    pixels, channels = x.shape[0] * x.shape[2] * x.shape[3], x.shape[1] * 8 // bits
    if pixels:
        programs, shape = blocks(pixels, channels, ending)
        launch(
            requantize_kernel, "pixels", programs, x, as_bytes(x), tuple(fp32(vector) for vector in norm) or None,
            None if other is None else as_bytes(channels_last(other)), pixels, float(grid.zero_point), grid.scale,
            float(others.zero_point), others.scale, *ending.arguments, X_BITS=bits, X_SIGNED=grid.signed,
            OTHER_BITS=other_bits, OTHER_SIGNED=others.signed, CHANNELS=channels, **shape, **ending.constants,
        )  # fmt: skip
    return results
