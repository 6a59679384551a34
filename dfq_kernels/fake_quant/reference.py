"""Straight-through fake quantization in plain PyTorch: this file defines the operator."""

from __future__ import annotations

import torch
from torch import Tensor

from dfq_kernels._checks import QUANT_LIMIT


def per_axis(parameter: Tensor, x: Tensor, axis: int | None) -> Tensor:
    """`parameter` in the arithmetic's type, shaped to broadcast along `axis` of `x`."""
    parameter = parameter.to(arithmetic_dtype(x))
    if axis is None:
        return parameter.reshape(())
    return parameter.reshape([-1 if dim == axis else 1 for dim in range(x.dim())])


def arithmetic_dtype(x: Tensor) -> torch.dtype:
    """fp32, whatever the storage type; float64 stays (gradient checks need it)."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def forward(
    x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, axis: int | None
) -> tuple[Tensor, Tensor]:
    """`(out, inside)`; `inside` marks the elements that pass a gradient. In-place steps, each one rounding."""
    scale, zero_point = per_axis(scale, x, axis), per_axis(zero_point, x, axis)
    # an explicit cast: a scale of no dimensions would not widen bf16
    rounded = (x.to(scale.dtype) * reciprocal(scale)).add_(zero_point).round_()
    q = rounded.clamp(quant_min, quant_max)
    inside = q == rounded  # false for NaN
    return q.sub_(zero_point).mul_(scale).to(x.dtype), inside


def reciprocal(scale: Tensor) -> Tensor:
    """`1 / scale`; NaN, which no result hides, of a scale that is not above 0."""
    return torch.where(scale > 0, 1 / scale, float("nan"))


def backward(grad_out: Tensor, inside: Tensor, stride: tuple[int, ...]) -> Tensor:
    """The gradient of x where the scale is given; `stride` (of `out`) is for backends whose mask is packed."""
    return grad_out * inside


def backward_learned(
    grad_out: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, axis: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, scale and zero_point, the last two summed in the arithmetic's type."""
    scale_b, zero_point_b = per_axis(scale, x, axis), per_axis(zero_point, x, axis)
    grad = grad_out.to(arithmetic_dtype(x))
    scaled = x.to(grad.dtype) * reciprocal(scale_b)
    rounded = (scaled + zero_point_b).round_()
    q = rounded.clamp(quant_min, quant_max)
    inside = (q == rounded).to(grad.dtype)
    # finite before it meets a 0; inside the bounds the clamp changes nothing
    scaled.clamp_(-2 * QUANT_LIMIT, 2 * QUANT_LIMIT)
    error = q.sub_(zero_point_b).sub_(scaled.mul_(inside))
    grad_inside = grad * inside
    grad_scale = _sum_to_axis(error.mul_(grad), axis)
    grad_zero_point = _sum_to_axis(grad_inside - grad, axis) * scale.to(grad.dtype).reshape(
        () if axis is None else (-1,)
    )
    return (
        grad_inside.to(x.dtype),
        grad_scale.to(scale.dtype).reshape(scale.shape),
        grad_zero_point.to(zero_point.dtype).reshape(zero_point.shape),
    )


def _sum_to_axis(values: Tensor, axis: int | None) -> Tensor:
    if axis is None:
        return values.sum()
    others = [dim for dim in range(values.dim()) if dim != axis]
    return values.sum(others) if others else values  # no dimensions would mean all
