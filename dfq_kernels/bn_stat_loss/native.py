"""`bn_stat_loss` in C++: csrc/cpu/bn_stat_loss.cpp."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dfq_kernels.extension import fp32, native, register, where

_LISTS = "Tensor[] means, Tensor[] variances, Tensor[] running_means, Tensor[] running_vars, float[] eps"


def _addresses(tensors: Sequence[Tensor]) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


def _fake_forward(means: Sequence[Tensor], *rest: object) -> Tensor:
    return means[0].new_empty((), dtype=torch.float32)


@register(f"bn_stat_loss({_LISTS}) -> Tensor", _fake_forward)
def forward(
    means: Sequence[Tensor],
    variances: Sequence[Tensor],
    running_means: Sequence[Tensor],
    running_vars: Sequence[Tensor],
    eps: Sequence[float],
) -> Tensor:
    """The sum over layers and channels."""
    lists = [[fp32(tensor) for tensor in tensors] for tensors in (means, variances, running_means, running_vars)]
    loss = _fake_forward(means)
    channels = [mean.numel() for mean in means]
    native().bn_stat_loss_forward(
        where(loss), *[_addresses(tensors) for tensors in lists], channels, list(eps), loss.data_ptr()
    )
    return loss


def _fake_backward(grad_out: Tensor, means: Sequence[Tensor], *rest: object) -> tuple[list[Tensor], list[Tensor]]:
    grads = [torch.empty_like(mean, dtype=torch.float32) for mean in means]
    return grads, [torch.empty_like(grad) for grad in grads]


@register(f"bn_stat_loss_backward(Tensor grad_out, {_LISTS}) -> (Tensor[], Tensor[])", _fake_backward)
def backward(
    grad_out: Tensor,
    means: Sequence[Tensor],
    variances: Sequence[Tensor],
    running_means: Sequence[Tensor],
    running_vars: Sequence[Tensor],
    eps: Sequence[float],
) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of every batch mean and variance."""
    lists = [[fp32(tensor) for tensor in tensors] for tensors in (means, variances, running_means, running_vars)]
    grad_out = fp32(grad_out)
    grad_means, grad_vars = _fake_backward(grad_out, lists[0])
    native().bn_stat_loss_backward(
        where(grad_out), *[_addresses(tensors) for tensors in lists], [mean.numel() for mean in means], list(eps),
        grad_out.data_ptr(), _addresses(grad_means), _addresses(grad_vars),
    )  # fmt: skip
    return grad_means, grad_vars
