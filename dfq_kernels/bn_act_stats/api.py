"""Public function of the operator: checks and autograd."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from dfq_kernels._checks import check_activation, check_channels, check_eps, check_float, check_per_channel
from dfq_kernels._eager import once, recorded
from dfq_kernels.dispatch import resolve

OP = "bn_act_stats"


def bn_act_stats(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    *,
    eps: float = 1e-5,
    activation: str | None = "relu",
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """A frozen teacher's batch norm and activation, and the batch statistics of its input, in one call.

        out = act((x - running_mean) * (weight / sqrt(running_var + eps)) + bias)
        mean, var = bn_stats(x)

    The gradient of x joins both paths. The parameters get none: the teacher is frozen.

    Args:
        x: `[N, C, ...]`, not empty; float32, bfloat16 or float16; arithmetic in fp32.
        weight, bias: `[C]` or None (1 and 0).
        running_mean, running_var: `[C]`, the stored statistics.
        eps: finite and > 0.
        activation: None, `relu` or `relu6`.
        backend: `native`, `triton` or `reference`; None takes the best that is there.

    Returns:
        `(out, mean, var)`: out as `x`; mean and biased variance fp32 `[C]`.

    Raises:
        ValueError: a wrong shape, dtype or device, or a parameter that requires a gradient.
        BackendError: an explicit backend that is not there.

    Source: Choi et al. 2020 (arXiv 2005.04136) section 3.2.
    """
    check_float(OP, "x", x)
    check_channels(OP, x)
    parameters = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    check_per_channel(OP, x, **parameters)
    check_eps(OP, eps)
    check_activation(OP, activation)
    for name, parameter in parameters.items():
        if parameter is not None and parameter.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{OP}: {name} must not require a gradient (the teacher is frozen), got requires_grad=True"
            )
    impl = resolve(OP, backend, x)
    arguments = (x, weight, bias, running_mean, running_var, eps, activation)
    out, mean, var = BnActStats.apply(*arguments, impl) if recorded(x) else impl.forward(*arguments)
    return out, mean, var


class BnActStats(torch.autograd.Function):
    """Gradient of `bn_act_stats`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor,
        running_var: Tensor,
        eps: float,
        activation: str | None,
        impl: ModuleType,
    ) -> tuple[Tensor, Tensor, Tensor]:
        out, mean, var = impl.forward(x, weight, bias, running_mean, running_var, eps, activation)
        ctx.save_for_backward(x, mean, weight, bias, running_mean, running_var)
        ctx.settings, ctx.impl = (eps, activation), impl
        return out, mean, var

    @staticmethod
    @once
    def backward(ctx: Any, grad_out: Tensor, grad_mean: Tensor, grad_var: Tensor) -> tuple[Tensor | None, ...]:
        grad_x = ctx.impl.backward(grad_out, grad_mean, grad_var, *ctx.saved_tensors, *ctx.settings)
        return grad_x, None, None, None, None, None, None, None
