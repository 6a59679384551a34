"""Gaussian KL between batch statistics and stored ones, all layers, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def forward(
    means: Sequence[Tensor],
    variances: Sequence[Tensor],
    running_means: Sequence[Tensor],
    running_vars: Sequence[Tensor],
    eps: Sequence[float],
) -> Tensor:
    """The sum over layers and channels."""
    total = means[0].new_zeros(())
    for mean, var, running_mean, running_var, floor in zip(
        means, variances, running_means, running_vars, eps, strict=True
    ):
        var, running_var = var.clamp(min=floor), running_var.clamp(min=floor)
        terms = ((mean - running_mean).square() + var) / (2 * running_var) - 0.5 * torch.log(var / running_var) - 0.5
        total = total + terms.sum()
    return total


def backward(
    grad_out: Tensor,
    means: Sequence[Tensor],
    variances: Sequence[Tensor],
    running_means: Sequence[Tensor],
    running_vars: Sequence[Tensor],
    eps: Sequence[float],
) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of every batch mean and variance; a variance below its floor gets none."""
    grad_means, grad_vars = [], []
    for mean, var, running_mean, running_var, floor in zip(
        means, variances, running_means, running_vars, eps, strict=True
    ):
        stored = running_var.clamp(min=floor)
        grad_means.append(grad_out * (mean - running_mean) / stored)
        slope = 1 / (2 * stored) - 1 / (2 * var.clamp(min=floor))
        grad_vars.append(torch.where(var >= floor, grad_out * slope, 0))
    return grad_means, grad_vars
