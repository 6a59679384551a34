"""`quantize` in C++: csrc/cpu/program.cpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dfq_kernels.integers import Epilogue
from dfq_kernels.memory import fp32
from dfq_kernels.programs import QUANTIZE, OneStep
from dfq_kernels.quantize import schema
from dfq_kernels.registration import register


@register(schema.FORWARD, "native")
def forward(x: Tensor, *epilogue: Any) -> list[Tensor]:
    """Activation and rounding of real numbers."""
    step = OneStep(QUANTIZE, x.shape, Epilogue.of(*epilogue))
    x = fp32(x[:, :, None, None] if x.dim() == 2 else x)
    try:
        return step.run(x, x)
    except ValueError:  # it meets NaN: whoever wants none has looked for it
        return step.run(x, torch.where(x.isnan(), 0, x))
