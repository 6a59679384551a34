"""`fake_quant_weights` in Triton: one launch for all layers of one type."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from dfq_kernels.fake_quant_weights import schema
from dfq_kernels.layers import chunks, find_layer, of_layer
from dfq_kernels.registration import register
from dfq_kernels.tiles import elements, launch, most, most_of, narrow, reciprocal, round_to


@triton.jit
def rows_kernel(weights, outs, scales, sizes, quant_maxs, ends, BLOCK: tl.constexpr):
    # math     scale = max(max |w| / quant_max, 2^-63); out = clamp(rne(w / scale), -quant_max, quant_max) * scale
    # traffic  w read (the second read is from cache), out written
    # grid     one program per output channel of any layer
    # order    the maximum is exact in any order; every operation rounded on its own
    layer, begin = find_layer(ends, tl.program_id(0))
    channel = tl.program_id(0) - begin
    weight, out, size = of_layer(weights, layer), of_layer(outs, layer), of_layer(sizes, layer)
    quant_max = of_layer(quant_maxs, layer)
    row = channel.to(tl.int64) * size
    largest = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        values = tl.load(weight + row + at, mask=at < size, other=0.0).to(tl.float32)
        largest = most(largest, tl.abs(values))
    scale = tl.div_rn(most_of(largest), quant_max)
    scale = tl.where(scale < 1.0842021724855044e-19, 1.0842021724855044e-19, scale)  # 2^-63; NaN stays NaN
    tl.store(of_layer(scales, layer) + channel, scale)
    inv = reciprocal(scale)
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        values = tl.load(weight + row + at, mask=at < size, other=0.0).to(tl.float32)
        _, q = round_to(values * inv, -quant_max, quant_max, False)
        tl.store(out + row + at, narrow(q * scale, out.dtype.element_ty), mask=at < size)


@register(schema.FORWARD, "triton")
def forward(
    weights: Sequence[Tensor], bits: Sequence[int], dtype: torch.dtype | None
) -> tuple[list[Tensor], list[Tensor]]:
    """`(outs, scales)`, one of each per weight."""
    weights = [schema.rows(weight) for weight in weights]
    outs, scales = schema.allocate(weights, bits, dtype)
    layers = list(zip(weights, outs, scales, bits, strict=True))
    for kind in dict.fromkeys(weight.dtype for weight in weights):
        for chunk in chunks([layer for layer in layers if layer[0].dtype == kind]):
            chosen, results, factors, counts = zip(*chunk, strict=True)
            sizes = tuple(weight.numel() // weight.shape[0] for weight in chosen)
            ends = tuple(accumulate(weight.shape[0] for weight in chosen))
            block = min(elements("row"), triton.next_power_of_2(max(sizes)))
            levels = tuple(float(2 ** (count - 1) - 1) for count in counts)
            launch(rows_kernel, "row", ends[-1], chosen[0], chosen, results, factors, sizes, levels, ends, BLOCK=block)
    return outs, scales
