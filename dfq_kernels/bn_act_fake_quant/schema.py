"""What every backend of `bn_act_fake_quant` has: arguments, results and their shapes."""

from __future__ import annotations

import torch
from torch import Tensor

from dfq_kernels.registration import Schema


def allocate(x: Tensor, *settings: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`(out, mean, var, used)`, not yet written."""
    mean = x.new_empty(x.shape[1], dtype=torch.float32)
    return torch.empty_like(x), mean, torch.empty_like(mean), mean.new_empty(2)


def allocate_grads(grad_out: Tensor, x: Tensor, *rest: object) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of x, weight, bias, scale and zero_point, not yet written; the last two without elements if not learned."""
    channel = x.new_empty(x.shape[1], dtype=torch.float32)
    scalar = channel.new_empty(() if rest[-1] else 0)
    return torch.empty_like(x), channel, torch.empty_like(channel), scalar, torch.empty_like(scalar)


FORWARD = Schema(
    "bn_act_fake_quant",
    "(Tensor x, Tensor? weight, Tensor? bias, Tensor(a!) running_mean, Tensor(b!) running_var, "
    "Tensor(c!) running_min, Tensor(d!) running_max, Tensor(e!) scale, Tensor(f!) zero_point, bool training, "
    "float momentum, float eps, str? activation, bool observe, float averaging_constant, int quant_min, "
    "int quant_max, bool symmetric) -> (Tensor, Tensor, Tensor, Tensor)",
    allocate,
)
BACKWARD = Schema(
    "bn_act_fake_quant_backward",
    "(Tensor grad_out, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, Tensor scale, "
    "Tensor zero_point, bool training, float eps, str? activation, int quant_min, int quant_max, bool learned) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    allocate_grads,
)
