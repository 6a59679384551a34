"""What every backend of `observe_fake_quant` has: arguments, results and their shapes."""

from __future__ import annotations

import torch
from torch import Tensor

from dfq_kernels.memory import mask_like
from dfq_kernels.registration import Schema


def _forward(x: Tensor, *settings: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), mask_like(x)


FORWARD = Schema(
    "observe_fake_quant",
    "(Tensor x, Tensor(a!) running_min, Tensor(b!) running_max, Tensor(c!) scale, Tensor(d!) zero_point, "
    "float averaging_constant, int quant_min, int quant_max, bool symmetric) -> (Tensor, Tensor)",
    _forward,
)
