"""`bn_stat_loss` in C++: csrc/cpu/bn_stat_loss.cpp."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dfq_kernels.bn_stat_loss import schema
from dfq_kernels.extension import native, where
from dfq_kernels.memory import fp32
from dfq_kernels.registration import register


def _addresses(tensors: Sequence[Tensor]) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


@register(schema.FORWARD, "native")
def forward(
    means: Sequence[Tensor],
    variances: Sequence[Tensor],
    running_means: Sequence[Tensor],
    running_vars: Sequence[Tensor],
    eps: Sequence[float],
) -> Tensor:
    """The sum over layers and channels."""
    lists = [[fp32(tensor) for tensor in tensors] for tensors in (means, variances, running_means, running_vars)]
    loss = schema.allocate(means)
    channels = [mean.numel() for mean in means]
    native().bn_stat_loss_forward(
        where(loss), *[_addresses(tensors) for tensors in lists], channels, list(eps), loss.data_ptr()
    )
    return loss


@register(schema.BACKWARD, "native")
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
    grad_means, grad_vars = schema.allocate_grads(grad_out, lists[0])
    native().bn_stat_loss_backward(
        where(grad_out), *[_addresses(tensors) for tensors in lists], [mean.numel() for mean in means], list(eps),
        grad_out.data_ptr(), _addresses(grad_means), _addresses(grad_vars),
    )  # fmt: skip
    return grad_means, grad_vars
