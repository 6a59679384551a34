"""`quantize` in Triton."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from dfq_kernels.integer_tiles import Ending, blocks, finish, place_of
from dfq_kernels.integers import Epilogue, allocate
from dfq_kernels.quantize import schema
from dfq_kernels.registration import register
from dfq_kernels.tiles import launch


@triton.jit
def quantize_kernel(
    x, pixels, image, row, column, channel, height, width,
    first, then,
    CHANNELS: tl.constexpr, R: tl.constexpr, B: tl.constexpr, P: tl.constexpr, ACTIVATION: tl.constexpr,
    NEXT_ACTIVATION: tl.constexpr, BITS: tl.constexpr, NEXT_BITS: tl.constexpr,
):  # fmt: skip
    # math     t = act(x); q = clamp(rne(t * (1 / scale) + zero_point), quant_min, quant_max)
    # traffic  x read once, its integers written; strides of x as they come, the integers channels-last
    # grid     one program per R pixels and B channels
    # order    every operation rounded on its own
    pixel, c, rows, known, block = place_of(tl.program_id(0), pixels, CHANNELS, R, B, P)
    n, y = pixel // (height * width), pixel // width % height
    offset = n * image + y * row + pixel % width * column + c.to(tl.int64) * channel
    t = tl.load(x + offset, mask=rows & known, other=0.0).to(tl.float32)
    t = tl.where(t == t, t, 0.0)  # whoever wants no NaN has looked for it
    finish(t, pixel, c, rows, known, block, first, then,
           CHANNELS, R, B, P, ACTIVATION, NEXT_ACTIVATION, BITS, NEXT_BITS)  # fmt: skip


@register(schema.FORWARD, "triton")
def forward(x: Tensor, *flat: Any) -> list[Tensor]:
    """Activation and rounding of real numbers."""
    epilogue = Epilogue.of(*flat)
    results = allocate(x, x.shape, epilogue)
    x = x[:, :, None, None] if x.dim() == 2 else x
    ending = Ending(epilogue, results)
    count, channels, height, width = x.shape
    if x.numel():
        programs, shape = blocks(count * height * width, channels, ending)
        image, channel, row, column = x.stride()
        launch(
            quantize_kernel, "pixels", programs, x, x, count * height * width, image, row, column, channel, height,
            width, *ending.arguments, CHANNELS=channels, **shape, **ending.constants,
        )  # fmt: skip
    return results
