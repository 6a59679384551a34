"""`fake_quant_weights` in Triton: one launch per layer."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from dfq_kernels.fake_quant_weights import schema
from dfq_kernels.registration import register
from dfq_kernels.tiles import clamp, elements, launch, most, most_of, narrow, reciprocal, rne


@triton.jit
def rows_kernel(weight, out, scales, size, quant_max, BLOCK: tl.constexpr):
    # math     scale = max(max |w| / quant_max, 2^-23); out = clamp(rne(w / scale), -quant_max, quant_max) * scale
    # traffic  w read (the second read is from cache), out written
    # grid     one program per output channel
    # order    the maximum is exact in any order; every operation rounded on its own
    row = tl.program_id(0).to(tl.int64) * size
    largest = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        values = tl.load(weight + row + at, mask=at < size, other=0.0).to(tl.float32)
        largest = most(largest, tl.abs(values))
    scale = tl.div_rn(most_of(largest), quant_max)
    scale = tl.where(scale < 1.1920928955078125e-07, 1.1920928955078125e-07, scale)  # 2^-23; NaN stays NaN
    tl.store(scales + tl.program_id(0), scale)
    inv = reciprocal(scale)
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        values = tl.load(weight + row + at, mask=at < size, other=0.0).to(tl.float32)
        q = clamp(rne(values * inv), -quant_max, quant_max)
        tl.store(out + row + at, narrow(q * scale, out.dtype.element_ty), mask=at < size)


@register(schema.FORWARD, "triton")
def forward(weights: Sequence[Tensor], bits: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
    """`(outs, scales)`, one of each per weight."""
    weights = [schema.rows(weight) for weight in weights]
    outs, scales = schema.allocate(weights, bits)
    for weight, out, scale, count in zip(weights, outs, scales, bits, strict=True):
        size = weight.numel() // weight.shape[0]
        block = min(elements("row"), triton.next_power_of_2(size))
        quant_max = float(2 ** (count - 1) - 1)
        launch(rows_kernel, "row", weight.shape[0], weight, weight, out, scale, size, quant_max, BLOCK=block)
    return outs, scales
