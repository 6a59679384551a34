"""`bn_stats` in C++: csrc/cpu/bn_stats.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from dfq_kernels.extension import DTYPES, dense, fp32, native, register, view, where, workspace


def _fake_forward(x: Tensor) -> tuple[Tensor, Tensor]:
    mean = x.new_empty(x.shape[1], dtype=torch.float32)
    return mean, torch.empty_like(mean)


@register("bn_stats(Tensor x) -> (Tensor, Tensor)", _fake_forward)
def forward(x: Tensor) -> tuple[Tensor, Tensor]:
    """`(mean, var)`."""
    x = dense(x)
    mean, var = _fake_forward(x)
    shape = view(x, 1)
    room = workspace(x, shape)
    native().bn_stats_forward(DTYPES[x.dtype], where(x, room), *shape, x.data_ptr(), mean.data_ptr(), var.data_ptr())
    return mean, var


def _fake_backward(grad_mean: Tensor, grad_var: Tensor, x: Tensor, mean: Tensor) -> Tensor:
    return torch.empty_like(x)


@register("bn_stats_backward(Tensor grad_mean, Tensor grad_var, Tensor x, Tensor mean) -> Tensor", _fake_backward)
def backward(grad_mean: Tensor, grad_var: Tensor, x: Tensor, mean: Tensor) -> Tensor:
    """`(grad_mean + 2 (x - mean) grad_var) / count` per element."""
    x, grad_mean, grad_var = dense(x), fp32(grad_mean), fp32(grad_var)
    grad_x = torch.empty_like(x)
    native().bn_stats_backward(
        DTYPES[x.dtype], where(x), *view(x, 1), grad_mean.data_ptr(), grad_var.data_ptr(), x.data_ptr(),
        mean.data_ptr(), grad_x.data_ptr(),
    )  # fmt: skip
    return grad_x
