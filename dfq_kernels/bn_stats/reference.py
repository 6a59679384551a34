"""Per-channel mean and biased variance in plain PyTorch."""

from __future__ import annotations

from torch import Tensor

from dfq_kernels.fake_quant.reference import arithmetic_dtype, per_axis


def forward(x: Tensor) -> tuple[Tensor, Tensor]:
    """`(mean, var)`. Two passes: the second one centres, so a mean far from 0 costs no digits of the variance."""
    dims = [dim for dim in range(x.dim()) if dim != 1]
    arithmetic = x.to(arithmetic_dtype(x))
    mean = arithmetic.mean(dims)
    var = (arithmetic - per_axis(mean, x, 1)).square_().mean(dims)
    return mean, var


def backward(grad_mean: Tensor, grad_var: Tensor, x: Tensor, mean: Tensor) -> Tensor:
    """`(grad_mean + 2 (x - mean) grad_var) / count` per element."""
    count = x.numel() // x.shape[1]
    centred = x - per_axis(mean, x, 1)
    return centred.mul_(per_axis(2 / count * grad_var, x, 1)).add_(per_axis(grad_mean / count, x, 1)).to(x.dtype)
