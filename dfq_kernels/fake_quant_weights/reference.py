"""Fake quantization of all layers' weights in plain PyTorch: per output channel, symmetric, nothing clips."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dfq_kernels.fake_quant import reference as fake_quant
from dfq_kernels.observe_fake_quant.reference import SCALE_FLOOR, divided


def forward(
    weights: Sequence[Tensor], bits: Sequence[int], dtype: torch.dtype | None
) -> tuple[list[Tensor], list[Tensor]]:
    """`(outs, scales)`, one of each per weight."""
    outs, scales = [], []
    for weight, count in zip(weights, bits, strict=True):
        quant_max = 2 ** (count - 1) - 1
        arithmetic = weight.to(fake_quant.arithmetic_dtype(weight))
        scale = divided(arithmetic.flatten(1).abs().amax(1), quant_max).clamp(min=SCALE_FLOOR)
        out, _ = fake_quant.forward(arithmetic, scale, scale.new_zeros(()).expand_as(scale), -quant_max, quant_max, 0)
        outs.append(out.to(weight.dtype if dtype is None else dtype))
        scales.append(scale)
    return outs, scales
