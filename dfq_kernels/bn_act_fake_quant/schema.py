"""What every backend of `bn_act_fake_quant` has: arguments, results and their shapes."""

from __future__ import annotations

import torch
from torch import Tensor

from dfq_kernels.registration import Schema


def allocate(x: Tensor, *settings: object) -> tuple[Tensor, Tensor, Tensor]:
    """`(out, mean, var)`, not yet written."""
    mean = x.new_empty(x.shape[1], dtype=torch.float32)
    return torch.empty_like(x), mean, torch.empty_like(mean)


def allocate_grads(grad_out: Tensor, x: Tensor, *rest: object) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of x, weight, bias, scale and zero_point, the last two 0, the others not yet written."""
    channel, scalar = x.new_empty(x.shape[1], dtype=torch.float32), x.new_zeros((), dtype=torch.float32)
    return torch.empty_like(x), channel, torch.empty_like(channel), scalar, torch.zeros_like(scalar)


FORWARD = Schema(
    "bn_act_fake_quant",
    "(Tensor x, Tensor? weight, Tensor? bias, Tensor(a!) running_mean, Tensor(b!) running_var, "
    "Tensor(c!) running_min, Tensor(d!) running_max, Tensor(e!) scale, Tensor(f!) zero_point, bool training, "
    "float momentum, float eps, str? activation, bool observe, float averaging_constant, int quant_min, "
    "int quant_max, bool symmetric) -> (Tensor, Tensor, Tensor)",
    allocate,
)
BACKWARD = Schema(
    "bn_act_fake_quant_backward",
    "(Tensor grad_out, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, Tensor scale, "
    "Tensor zero_point, bool training, float eps, str? activation, int quant_min, int quant_max, bool learned) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    allocate_grads,
)
