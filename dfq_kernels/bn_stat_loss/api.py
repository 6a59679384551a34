"""Public function of the operator: checks and autograd."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from dfq_kernels._checks import check_device, check_eps, check_float, widest
from dfq_kernels._eager import once
from dfq_kernels.dispatch import resolve

OP = "bn_stat_loss"


def bn_stat_loss(
    means: Sequence[Tensor],
    variances: Sequence[Tensor],
    running_means: Sequence[Tensor],
    running_vars: Sequence[Tensor],
    *,
    eps: float | Sequence[float] = 1e-5,
    backend: str | None = None,
) -> Tensor:
    """How far the batch statistics of all layers are from the stored ones, in nats.

        sum over layers, channels of KL(N(mean, var) || N(running_mean, running_var))
        KL = ((mean - running_mean)^2 + var) / (2 running_var) - 0.5 log(var / running_var) - 0.5

    Both variances are at least the layer's eps (a dead channel has var 0). Gradients for `means` and `variances`:
    `(mean - running_mean) / running_var` and `1 / (2 running_var) - 1 / (2 var)`, 0 where var is below eps.

    Args:
        means, variances: per layer fp32 `[C]`, the batch's mean and **biased** variance of the batch norm's input.
        running_means, running_vars: per layer fp32 `[C]`, the stored statistics.
        eps: one number, or one per layer; finite and > 0.
        backend: `native`, `triton` or `reference`; None takes the best that is there.

    Returns:
        A scalar, fp32, >= 0 up to rounding.

    Raises:
        ValueError: no layers, lists of different lengths, a wrong shape, dtype or device.
        BackendError: an explicit backend that is not there.

    Source: Choi et al. 2020 (arXiv 2005.04136) section 3.2.
    """
    lists = {"means": means, "variances": variances, "running_means": running_means, "running_vars": running_vars}
    if len(means) == 0:
        raise ValueError(f"{OP}: means must hold at least one layer, got none")
    floors = [eps] * len(means) if isinstance(eps, (int, float)) else list(eps)
    for name, values in {**lists, "eps": floors}.items():
        if len(values) != len(means):
            raise ValueError(f"{OP}: {name} must hold {len(means)} layers, as means does, got {len(values)}")
    for floor in floors:
        check_eps(OP, floor)
    for name, tensors in lists.items():
        for index, tensor in enumerate(tensors):
            check_float(OP, f"{name}[{index}]", tensor)
            if tensor.dim() != 1 or tensor.shape != means[index].shape:
                raise ValueError(
                    f"{OP}: {name}[{index}] must have shape [C], as means[{index}] has, got {tuple(tensor.shape)}"
                )
            check_device(OP, f"{name}[{index}]", tensor, means[0])
    impl = resolve(OP, backend, widest([*means, *variances]))
    return BnStatLoss.apply(floors, impl, *means, *variances, *running_means, *running_vars)


class BnStatLoss(torch.autograd.Function):
    """Gradient of `bn_stat_loss`; the four lists travel as one."""

    @staticmethod
    def forward(ctx: Any, eps: list[float], impl: ModuleType, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.eps, ctx.impl = eps, impl
        return impl.forward(*_quarters(tensors), eps)

    @staticmethod
    @once
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        grad_means, grad_vars = ctx.impl.backward(grad_out, *_quarters(ctx.saved_tensors), ctx.eps)
        return None, None, *grad_means, *grad_vars, *[None] * (2 * len(grad_means))


def _quarters(tensors: Sequence[Tensor]) -> list[Sequence[Tensor]]:
    layers = len(tensors) // 4
    return [tensors[start : start + layers] for start in range(0, 4 * layers, layers)]
