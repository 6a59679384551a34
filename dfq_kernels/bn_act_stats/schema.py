"""What every backend of `bn_act_stats` has: arguments, results and their shapes."""

from __future__ import annotations

import torch
from torch import Tensor

from dfq_kernels.registration import Schema


def allocate(x: Tensor, *parameters: object) -> tuple[Tensor, Tensor, Tensor]:
    """`(out, batch_mean, batch_var)`, not yet written."""
    mean = x.new_empty(x.shape[1], dtype=torch.float32)
    return torch.empty_like(x), mean, torch.empty_like(mean)


def _backward(grad_out: Tensor, grad_mean: Tensor, grad_var: Tensor, x: Tensor, *rest: object) -> Tensor:
    return torch.empty_like(x)


FORWARD = Schema(
    "bn_act_stats",
    "(Tensor x, Tensor? weight, Tensor? bias, Tensor running_mean, Tensor running_var, float eps, str? activation) "
    "-> (Tensor, Tensor, Tensor)",
    allocate,
)
BACKWARD = Schema(
    "bn_act_stats_backward",
    "(Tensor grad_out, Tensor grad_mean, Tensor grad_var, Tensor x, Tensor batch_mean, Tensor? weight, Tensor? bias, "
    "Tensor running_mean, Tensor running_var, float eps, str? activation) -> Tensor",
    _backward,
)
