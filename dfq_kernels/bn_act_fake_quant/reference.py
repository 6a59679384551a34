"""Batch norm, activation, range update and fake quantization in plain PyTorch: the student's layer."""

from __future__ import annotations

import torch
from torch import Tensor

from dfq_kernels.bn_act_stats.reference import activation_grad, normalize
from dfq_kernels.bn_stats import reference as bn_stats
from dfq_kernels.fake_quant import reference as fake_quant
from dfq_kernels.fake_quant.reference import arithmetic_dtype, per_axis
from dfq_kernels.observe_fake_quant.reference import update_parameters, update_range


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    running_min: Tensor,
    running_max: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    training: bool,
    momentum: float,
    eps: float,
    activation: str | None,
    observe: bool,
    averaging_constant: float,
    quant_min: int,
    quant_max: int,
    symmetric: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`(out, mean, var, used)`, copies of the statistics that normalised and of the scale and zero point that rounded;
    stored statistics and range are updated in place."""
    if training:
        mean, var = bn_stats.forward(x)
        count = x.numel() // x.shape[1]
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        running_var.lerp_((var * (count / (count - 1))).to(running_var.dtype), momentum)
    else:
        mean, var = running_mean.clone(), running_var.clone()
    y = normalize(x, weight, bias, mean, var, eps, activation)
    if observe:
        update_range(*torch.aminmax(y), running_min, running_max, averaging_constant)
        update_parameters(running_min, running_max, scale, zero_point, quant_min, quant_max, symmetric)
    out, _ = fake_quant.forward(y, scale, zero_point, quant_min, quant_max, None)
    used = torch.stack([value.reshape(()).to(arithmetic_dtype(x)) for value in (scale, zero_point)])
    return out.to(x.dtype), mean, var, used


def backward(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    training: bool,
    eps: float,
    activation: str | None,
    quant_min: int,
    quant_max: int,
    learned: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias, scale and zero_point, the last two without elements if not learned.

    The activation is computed again rather than kept.
    """
    y = normalize(x, weight, bias, mean, var, eps, activation)
    grad, grad_scale, grad_zero_point = fake_quant.backward_learned(
        grad_out.to(y.dtype), y, scale, zero_point, quant_min, quant_max, None
    )
    if not learned:
        grad_scale, grad_zero_point = grad_scale.new_empty(0), grad_zero_point.new_empty(0)
    grad = activation_grad(grad, y, activation)
    inv_std = torch.rsqrt(var.to(arithmetic_dtype(x)) + eps)
    normalized = (x - per_axis(mean, x, 1)).mul_(per_axis(inv_std, x, 1))
    dims = [dim for dim in range(x.dim()) if dim != 1]
    grad_bias = grad.sum(dims)
    grad_weight = (grad * normalized).sum(dims)
    factor = per_axis(inv_std if weight is None else weight * inv_std, x, 1)
    if training:
        count = x.numel() // x.shape[1]
        grad = grad - per_axis(grad_bias / count, x, 1) - normalized * per_axis(grad_weight / count, x, 1)
    return (grad * factor).to(x.dtype), grad_weight, grad_bias, grad_scale, grad_zero_point
