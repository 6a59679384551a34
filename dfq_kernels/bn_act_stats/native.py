"""`bn_act_stats` in C++: csrc/cpu/bn_act_stats.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from dfq_kernels.bn_act_stats import schema
from dfq_kernels.extension import address, native, where, workspace
from dfq_kernels.memory import ACTIVATIONS, DTYPES, dense, fp32, in_order_of, optional, view
from dfq_kernels.registration import register


@register(schema.FORWARD, "native")
def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float, activation: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`(out, batch_mean, batch_var)`."""
    x, weight, bias, mean, var = dense(x), optional(weight), optional(bias), fp32(mean), fp32(var)
    out, batch_mean, batch_var = schema.allocate(x)
    shape = view(x, 1)
    room = workspace(x, shape)
    native().bn_act_stats_forward(
        DTYPES[x.dtype], where(x, room), *shape, x.data_ptr(), address(weight), address(bias),
        mean.data_ptr(), var.data_ptr(), eps, ACTIVATIONS[activation], out.data_ptr(), batch_mean.data_ptr(),
        batch_var.data_ptr(),
    )  # fmt: skip
    return out, batch_mean, batch_var


@register(schema.BACKWARD, "native")
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
    """Both gradients of x joined: through the batch norm, and through the statistics."""
    x, weight, bias, mean, var = dense(x), optional(weight), optional(bias), fp32(mean), fp32(var)
    grad_out, grad_mean, grad_var = in_order_of(x, grad_out), fp32(grad_mean), fp32(grad_var)
    grad_x = torch.empty_like(x)
    native().bn_act_stats_backward(
        DTYPES[x.dtype], where(x), *view(x, 1), grad_out.data_ptr(), grad_mean.data_ptr(),
        grad_var.data_ptr(), x.data_ptr(), batch_mean.data_ptr(), address(weight), address(bias), mean.data_ptr(),
        var.data_ptr(), eps, ACTIVATIONS[activation], grad_x.data_ptr(),
    )  # fmt: skip
    return grad_x
