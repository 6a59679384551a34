"""Public function of the operator: checks and autograd."""

from __future__ import annotations

from math import isfinite
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from dfq_kernels._checks import check_device, check_float, check_quant_range, check_storage
from dfq_kernels._eager import once, recorded
from dfq_kernels.dispatch import resolve, whole_call

OP = "fake_quant"


def fake_quant(
    x: Tensor,
    scale: Tensor | float,
    zero_point: Tensor | float,
    quant_min: int = -128,
    quant_max: int = 127,
    axis: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Rounds `x` to the grid of a quantized integer and back, with a straight-through gradient.

        q   = clamp(rne(x * (1 / scale) + zero_point), quant_min, quant_max)
        out = (q - zero_point) * scale

    Arithmetic in fp32 whatever the type of `x`, every operation rounded on its own; `rne` rounds half to even.
    NaN stays NaN, infinities clamp.

    Gradients, with `inside` 1 where the clamp changed nothing and 0 elsewhere: x gets `grad_out * inside`;
    scale (LSQ) the sum of `grad_out * ((q - zero_point) - x / scale)` inside and `grad_out * (q - zero_point)` outside;
    zero_point the sum of `-grad_out * scale` outside.

    Args:
        x: any shape; float32, bfloat16, float16 (float64: arithmetic in float64).
        scale: one number, or `[x.shape[axis]]`; finite and at least 2^-126, so that 1 / scale is finite (a
            tensor's values are not read: no host sync; one that is not above 0 makes every result NaN).
        zero_point: as `scale`; integer-valued.
        quant_min, quant_max: the integers' bounds, `quant_min < quant_max`, at most 2^23 in magnitude.
        axis: the axis that `scale` runs along; None: one scale for the tensor.
        backend: `native`, `triton` or `reference`; None takes the best that is there.

    Returns:
        A tensor of the shape, dtype and layout of `x`.

    Raises:
        ValueError: a wrong shape, dtype, device or bound.
        BackendError: an explicit backend that is not there.

    Source: Jacob et al. 2017 (arXiv 1712.05877) eq. 12; LSQ: Esser et al. 2019 (arXiv 1902.08153) eq. 3.
    """
    whole = whole_call(OP, backend)
    if whole is not None and (done := whole(x, scale, zero_point, quant_min, quant_max, axis)) is not None:
        results, record = done
        if not record:
            return results[0]
        return FakeQuant.apply(x, scale, zero_point, (quant_min, quant_max, axis), resolve(OP, backend, x), results)
    check_float(OP, "x", x)
    check_quant_range(OP, quant_min, quant_max)
    if axis is not None:
        if isinstance(axis, bool) or not isinstance(axis, int) or not -x.dim() <= axis < x.dim():
            raise ValueError(f"{OP}: axis must be None or in [{-x.dim()}, {x.dim()}), got {axis!r}")
        axis %= x.dim()
    scale = _parameter(x, "scale", scale, axis)
    zero_point = _parameter(x, "zero_point", zero_point, axis)
    if x.numel() == 0:
        return x.clone()
    impl = resolve(OP, backend, x)
    if not recorded(x, scale, zero_point):
        return impl.forward(x, scale, zero_point, quant_min, quant_max, axis)[0]
    return FakeQuant.apply(x, scale, zero_point, (quant_min, quant_max, axis), impl, None)


def _parameter(x: Tensor, name: str, value: Tensor | float, axis: int | None) -> Tensor:
    if not isinstance(value, Tensor):
        if not isfinite(value) or (name == "scale" and value < 2.0**-126):
            rule = "finite and at least 2^-126" if name == "scale" else "finite"
            raise ValueError(f"{OP}: {name} must be {rule}, got {value}")
        shape = () if axis is None else (x.shape[axis],)
        return torch.full(shape, float(value), dtype=torch.float32, device=x.device)
    if value.dtype == torch.float32 and axis is None and value.numel() == 1 and value.device == x.device:
        check_storage(OP, name, value)
        return value
    if axis is None and value.numel() != 1:
        raise ValueError(f"{OP}: {name} must have one element when axis is None, got shape {tuple(value.shape)}")
    if axis is not None and value.shape not in ((x.shape[axis],), ()):
        raise ValueError(f"{OP}: {name} must have shape ({x.shape[axis]},), got {tuple(value.shape)}")
    if axis is not None and value.shape == ():
        value = value.expand(x.shape[axis])
    check_device(OP, name, value, x)
    check_storage(OP, name, value)
    if value.is_complex() or value.dtype == torch.bool or (name == "scale" and not value.is_floating_point()):
        raise ValueError(f"{OP}: {name} must be a float tensor, got {value.dtype}")
    return value if value.is_floating_point() else value.float()


class FakeQuant(torch.autograd.Function):
    """Gradient of `fake_quant`; a backend supplies the arithmetic, `done` the forward's results if they are there."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        settings: tuple[int, int, int | None],
        impl: ModuleType,
        done: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        out, inside = done or impl.forward(x, scale, zero_point, *settings)
        ctx.learned = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        ctx.save_for_backward(*((x, scale, zero_point) if ctx.learned else (inside,)))
        ctx.settings, ctx.stride, ctx.impl = settings, out.stride(), impl
        return out

    @staticmethod
    @once
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.learned:
            (inside,) = ctx.saved_tensors
            return ctx.impl.backward(grad_out, inside, ctx.stride), None, None, None, None, None
        grads = ctx.impl.backward_learned(grad_out, *ctx.saved_tensors, *ctx.settings)
        return *grads, None, None, None
