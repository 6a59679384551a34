"""Public function of the operator: checks and autograd."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from dfq_kernels._checks import check_channels, check_float
from dfq_kernels._eager import once, recorded
from dfq_kernels.dispatch import resolve, whole_call

OP = "bn_stats"


def bn_stats(x: Tensor, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Batch mean and biased variance of every channel, differentiable.

        mean[c] = sum(x[:, c]) / count,  var[c] = sum((x[:, c] - mean[c])^2) / count,  count = x.numel() / C
        grad_x = (grad_mean[c] + 2 (x - mean[c]) grad_var[c]) / count

    Args:
        x: `[N, C, ...]`, not empty; float32, bfloat16 or float16.
        backend: `native`, `triton` or `reference`; None takes the best that is there.

    Returns:
        `(mean, var)`, each fp32 `[C]`; the same bits whenever it is called with the same input.

    Raises:
        ValueError: a wrong shape or dtype.
        BackendError: an explicit backend that is not there.

    Source: Ioffe and Szegedy 2015 (arXiv 1502.03167) algorithm 1.
    """
    whole = whole_call(OP, backend)
    if whole is not None and (done := whole(x)) is not None:
        results, record = done
        return BnStats.apply(x, resolve(OP, backend, x), results) if record else results
    check_float(OP, "x", x)
    check_channels(OP, x)
    impl = resolve(OP, backend, x)
    mean, var = BnStats.apply(x, impl, None) if recorded(x) else impl.forward(x)
    return mean, var


class BnStats(torch.autograd.Function):
    """Gradient of `bn_stats`; `done`: the forward's results if they are there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, impl: ModuleType, done: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        mean, var = done or impl.forward(x)
        ctx.save_for_backward(x, mean)
        ctx.impl = impl
        return mean, var

    @staticmethod
    @once
    def backward(ctx: Any, grad_mean: Tensor, grad_var: Tensor) -> tuple[Tensor, None, None]:
        return ctx.impl.backward(grad_mean, grad_var, *ctx.saved_tensors), None, None
