"""Public function of the operator: checks and autograd."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from dfq_kernels._checks import (
    check_activation,
    check_channels,
    check_eps,
    check_float,
    check_fraction,
    check_per_channel,
    check_quant_range,
    check_scalar,
    check_written,
)
from dfq_kernels._eager import once, recorded
from dfq_kernels.dispatch import resolve

OP = "bn_act_fake_quant"


def bn_act_fake_quant(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    running_min: Tensor,
    running_max: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    *,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str | None = "relu",
    observe: bool = True,
    averaging_constant: float = 0.01,
    quant_min: int = 0,
    quant_max: int = 255,
    symmetric: bool = False,
    backend: str | None = None,
) -> Tensor:
    """A quantized student's batch norm, activation, range update and fake quantization in one call.

        y   = act((x - mean) * (weight / sqrt(var + eps)) + bias)     mean, var: the batch's if training, else stored
        range and parameters from y as in `observe_fake_quant`, if observe
        out = fake_quant(y, scale, zero_point)

    In training the stored statistics move by `momentum` towards the batch's (the variance unbiased, as in torch).
    Gradients: x, weight and bias as of batch norm and activation behind the straight-through mask of `fake_quant`;
    scale and zero_point as in `fake_quant`, for ranges that are learned (`observe=False`).

    Args:
        x: `[N, C, ...]`, not empty; float32, bfloat16 or float16; arithmetic in fp32.
        weight, bias: `[C]` or None (1 and 0).
        running_mean, running_var: `[C]`, the stored statistics; **updated in place** if training.
        running_min, running_max, scale, zero_point: float32, one element each; **updated in place** if observe; scale
            finite and at least 2^-126 (not read: no host sync; one that is not above 0 makes every result NaN).
        training: normalise with the batch's statistics; needs two values per channel.
        momentum: weight of this batch in the stored statistics, in [0, 1].
        eps: finite and > 0.
        activation: None, `relu` or `relu6`.
        observe: update the range from this batch.
        averaging_constant: weight of this batch in the range, in [0, 1].
        quant_min, quant_max: the integers' bounds, `quant_min < quant_max`; `quant_max > 0` if symmetric.
        symmetric: zero point 0.
        backend: `native`, `triton` or `reference`; None takes the best that is there.

    Returns:
        A tensor of the shape and dtype of `x`.

    Raises:
        ValueError: a wrong shape, dtype, device or bound; a learned scale together with observe.
        BackendError: an explicit backend that is not there.

    Source: arXiv 1502.03167 algorithm 1; arXiv 1712.05877 section 3.1; arXiv 1902.08153 eq. 3.
    """
    check_float(OP, "x", x)
    check_channels(OP, x)
    check_per_channel(OP, x, weight=weight, bias=bias, running_mean=running_mean, running_var=running_var)
    check_scalar(OP, x, running_min=running_min, running_max=running_max, scale=scale, zero_point=zero_point)
    check_fraction(OP, "momentum", momentum)
    check_fraction(OP, "averaging_constant", averaging_constant)
    check_eps(OP, eps)
    check_activation(OP, activation)
    check_quant_range(OP, quant_min, quant_max)
    if symmetric and quant_max <= 0:
        raise ValueError(f"{OP}: quant_max must be > 0 for a symmetric range, got {quant_max}")
    if training and x.numel() == x.shape[1]:
        raise ValueError(f"{OP}: x must have two values per channel in training, got shape {tuple(x.shape)}")
    if observe and scale.requires_grad:
        raise ValueError(f"{OP}: observe must be False for a scale that requires a gradient, got True")
    if training:
        check_written(OP, running_mean=running_mean, running_var=running_var)
    if observe:
        check_written(OP, running_min=running_min, running_max=running_max, zero_point=zero_point)
    settings = (
        training, momentum, eps, activation, observe, averaging_constant, quant_min, quant_max, symmetric,
    )  # fmt: skip
    impl = resolve(OP, backend, x)
    stored = (running_mean, running_var, running_min, running_max)
    if not recorded(x, weight, bias, scale, zero_point):
        return impl.forward(x, weight, bias, *stored, scale, zero_point, *settings)[0]
    return BnActFakeQuant.apply(x, weight, bias, *stored, scale, zero_point, settings, impl)


class BnActFakeQuant(torch.autograd.Function):
    """Gradient of `bn_act_fake_quant`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor,
        running_var: Tensor,
        running_min: Tensor,
        running_max: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        settings: tuple[Any, ...],
        impl: ModuleType,
    ) -> Tensor:
        out, mean, var, used = impl.forward(
            x, weight, bias, running_mean, running_var, running_min, running_max, scale, zero_point, *settings
        )
        # copies, all of them: the next call may move statistics and range before this one's backward
        ctx.save_for_backward(x, weight, bias, mean, var, used)
        ctx.shapes = scale.shape, zero_point.shape
        training, _, eps, activation, _, _, quant_min, quant_max, _ = settings
        ctx.settings, ctx.impl = (training, eps, activation, quant_min, quant_max), impl
        return out

    @staticmethod
    @once
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        needs, saved = ctx.needs_input_grad, ctx.saved_tensors  # once: checkpointing computes them there and then
        grad_x, grad_weight, grad_bias, grad_scale, grad_zero_point = ctx.impl.backward(
            grad_out, *saved[:5], *saved[5].unbind(), *ctx.settings, needs[7] or needs[8]
        )
        return (
            grad_x, grad_weight if needs[1] else None, grad_bias if needs[2] else None, None, None, None, None,
            grad_scale.reshape(ctx.shapes[0]) if needs[7] else None,
            grad_zero_point.reshape(ctx.shapes[1]) if needs[8] else None, None, None,
        )  # fmt: skip
