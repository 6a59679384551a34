"""Evaluation batch norm, activation, and the statistics of the input, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from dfq_kernels.bn_stats import reference as bn_stats
from dfq_kernels.fake_quant.reference import arithmetic_dtype, per_axis


def multiplier(weight: Tensor | None, var: Tensor, eps: float) -> Tensor:
    """`weight / sqrt(var + eps)`: one reciprocal square root, one product."""
    inv_std = torch.rsqrt(var + eps)
    return inv_std if weight is None else weight * inv_std


def normalize(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float, activation: str | None
) -> Tensor:
    """`act((x - mean) * multiplier + bias)` in the arithmetic's type, every operation rounded on its own."""
    dtype = arithmetic_dtype(x)
    out = x.to(dtype) - per_axis(mean, x, 1)
    out.mul_(per_axis(multiplier(weight, var.to(dtype), eps), x, 1))
    if bias is not None:
        out.add_(per_axis(bias, x, 1))
    if activation == "relu":
        out.relu_()
    elif activation == "relu6":
        out.clamp_(0, 6)
    elif activation is not None:
        raise ValueError(f"activation must be None, relu or relu6, got {activation!r}")
    return out


def activation_grad(grad: Tensor, out: Tensor, activation: str | None) -> Tensor:
    """The gradient behind the activation, whose output is `out`: 0 where it clipped."""
    if activation == "relu":
        return torch.ops.aten.threshold_backward(grad, out, 0)
    if activation == "relu6":
        return torch.ops.aten.hardtanh_backward(grad, out, 0, 6)
    if activation is not None:
        raise ValueError(f"activation must be None, relu or relu6, got {activation!r}")
    return grad


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float, activation: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`(out, batch_mean, batch_var)`."""
    out = normalize(x, weight, bias, mean, var, eps, activation).to(x.dtype)
    return out, *bn_stats.forward(x)


def backward(
    grad_out: Tensor,
    grad_mean: Tensor,
    grad_var: Tensor,
    x: Tensor,
    batch_mean: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    activation: str | None,
) -> Tensor:
    """Both gradients of x joined: through the batch norm (`out` is computed again) and through the statistics."""
    if activation is not None:
        out = normalize(x, weight, bias, mean, var, eps, activation).to(x.dtype)
        grad_out = activation_grad(grad_out, out, activation)
    factor = per_axis(multiplier(weight, var.to(arithmetic_dtype(x)), eps), x, 1)
    return (grad_out * factor + bn_stats.backward(grad_mean, grad_var, x.to(factor.dtype), batch_mean)).to(x.dtype)
