"""What every backend of `bn_stats` has: arguments, results and their shapes."""

from __future__ import annotations

import torch
from torch import Tensor

from dfq_kernels.registration import Schema


def allocate(x: Tensor) -> tuple[Tensor, Tensor]:
    """`(mean, var)`, not yet written."""
    mean = x.new_empty(x.shape[1], dtype=torch.float32)
    return mean, torch.empty_like(mean)


def _backward(grad_mean: Tensor, grad_var: Tensor, x: Tensor, mean: Tensor) -> Tensor:
    return torch.empty_like(x)


FORWARD = Schema("bn_stats", "(Tensor x) -> (Tensor, Tensor)", allocate)
BACKWARD = Schema(
    "bn_stats_backward", "(Tensor grad_mean, Tensor grad_var, Tensor x, Tensor mean) -> Tensor", _backward
)
