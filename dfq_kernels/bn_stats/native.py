"""`bn_stats` in C++: csrc/cpu/bn_stats.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from dfq_kernels.bn_stats import schema
from dfq_kernels.extension import native, where, workspace
from dfq_kernels.memory import DTYPES, dense, fp32, view
from dfq_kernels.registration import register


@register(schema.FORWARD, "native")
def forward(x: Tensor) -> tuple[Tensor, Tensor]:
    """`(mean, var)`."""
    x = dense(x)
    mean, var = schema.allocate(x)
    shape = view(x, 1)
    room = workspace(x, shape)
    native().bn_stats_forward(DTYPES[x.dtype], where(x, room), *shape, x.data_ptr(), mean.data_ptr(), var.data_ptr())
    return mean, var


@register(schema.BACKWARD, "native")
def backward(grad_mean: Tensor, grad_var: Tensor, x: Tensor, mean: Tensor) -> Tensor:
    """`(grad_mean + 2 (x - mean) grad_var) / count` per element."""
    x, grad_mean, grad_var = dense(x), fp32(grad_mean), fp32(grad_var)
    grad_x = torch.empty_like(x)
    native().bn_stats_backward(
        DTYPES[x.dtype], where(x), *view(x, 1), grad_mean.data_ptr(), grad_var.data_ptr(), x.data_ptr(),
        mean.data_ptr(), grad_x.data_ptr(),
    )  # fmt: skip
    return grad_x
