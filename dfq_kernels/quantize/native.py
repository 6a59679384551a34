"""`quantize` in C++: csrc/cpu/program.cpp."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dfq_kernels.integers import Epilogue
from dfq_kernels.memory import fp32
from dfq_kernels.programs import QUANTIZE, OneStep
from dfq_kernels.quantize import schema
from dfq_kernels.registration import register


@register(schema.FORWARD, "native")
def forward(
    x: Tensor, activation: str | None, outs: list[float], then: Sequence[Tensor], then_activation: str | None,
    then_outs: list[float],
) -> list[Tensor]:  # fmt: skip
    """Activation and rounding of real numbers."""
    step = OneStep(QUANTIZE, x.shape, Epilogue.of(activation, outs, then, then_activation, then_outs))
    x = fp32(x[:, :, None, None] if x.dim() == 2 else x)
    try:
        return step.run(x, x)
    except ValueError:  # it meets NaN: whoever wants none has looked for it
        return step.run(x, torch.where(x.isnan(), 0, x))
