"""Public function of the operator: checks and autograd."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from dfq_kernels._checks import check_float, check_fraction, check_quant_range, check_scalar, check_written
from dfq_kernels._eager import once, recorded
from dfq_kernels.dispatch import resolve

OP = "observe_fake_quant"


def observe_fake_quant(
    x: Tensor,
    running_min: Tensor,
    running_max: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    *,
    averaging_constant: float = 0.01,
    quant_min: int = 0,
    quant_max: int = 255,
    symmetric: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Moves the range towards the batch's, derives scale and zero point, fake-quantizes: one call, no host sync.

        running_min += averaging_constant * (min(x) - running_min), running_max likewise
        affine:     lo = min(running_min, 0), hi = max(running_max, 0)
                    scale = (hi - lo) / (quant_max - quant_min), zero_point = clamp(rne(quant_min - lo / scale))
        symmetric:  scale = max(-lo, hi) / quant_max, zero_point = 0
        out = fake_quant(x, scale, zero_point)

    A range with `running_min > running_max` (start with +inf, -inf) takes the first batch whole; a batch with NaN or
    infinity leaves the range as it is, others count with at most 2^126 in magnitude. The scale is at least 2^-63.
    Gradient of x: `grad_out` where the clamp changed nothing, else 0; the range has no gradient.

    Args:
        x: any shape, at least one element; float32, bfloat16 or float16.
        running_min, running_max, scale, zero_point: float32, one element each; **updated in place**.
        averaging_constant: weight of this batch, in [0, 1].
        quant_min, quant_max: the integers' bounds, `quant_min < quant_max`; `quant_max > 0` if symmetric.
        symmetric: zero point 0.
        backend: `native`, `triton` or `reference`; None takes the best that is there.

    Returns:
        A tensor of the shape and dtype of `x`.

    Raises:
        ValueError: a wrong shape, dtype, device or bound.
        BackendError: an explicit backend that is not there.

    Source: Jacob et al. 2017 (arXiv 1712.05877) sections 3 and 3.1.
    """
    check_float(OP, "x", x)
    if x.numel() == 0:
        raise ValueError(f"{OP}: x must have at least one element, got shape {tuple(x.shape)}")
    check_scalar(OP, x, running_min=running_min, running_max=running_max, scale=scale, zero_point=zero_point)
    check_written(OP, running_min=running_min, running_max=running_max, scale=scale, zero_point=zero_point)
    check_fraction(OP, "averaging_constant", averaging_constant)
    check_quant_range(OP, quant_min, quant_max)
    if symmetric and quant_max <= 0:
        raise ValueError(f"{OP}: quant_max must be > 0 for a symmetric range, got {quant_max}")
    impl = resolve(OP, backend, x)
    settings = (averaging_constant, quant_min, quant_max, symmetric)
    if not recorded(x):
        return impl.forward(x, running_min, running_max, scale, zero_point, *settings)[0]
    return ObserveFakeQuant.apply(x, running_min, running_max, scale, zero_point, settings, impl)


class ObserveFakeQuant(torch.autograd.Function):
    """Gradient of `observe_fake_quant`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        running_min: Tensor,
        running_max: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        settings: tuple[float, int, int, bool],
        impl: ModuleType,
    ) -> Tensor:
        out, inside = impl.forward(x, running_min, running_max, scale, zero_point, *settings)
        ctx.save_for_backward(inside)
        ctx.stride, ctx.impl = out.stride(), impl
        return out

    @staticmethod
    @once
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        (inside,) = ctx.saved_tensors
        return ctx.impl.backward(grad_out, inside, ctx.stride), None, None, None, None, None, None
