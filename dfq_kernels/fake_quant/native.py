"""`fake_quant` in C++: csrc/cpu/fake_quant.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from dfq_kernels.extension import native, where, whole_call, workspace
from dfq_kernels.fake_quant import schema
from dfq_kernels.memory import DTYPES, dense, fp32, in_order_of, mask_like, view
from dfq_kernels.registration import register


@register(schema.FORWARD, "native")
def forward(
    x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, axis: int | None
) -> tuple[Tensor, Tensor]:
    """`(out, inside)`; `inside` has one bit per element, in the memory order of `out`."""
    x, scale, zero_point = dense(x), fp32(scale), fp32(zero_point)
    out, mask = torch.empty_like(x), mask_like(x)
    native().fake_quant_forward(
        DTYPES[x.dtype], where(x), *view(x, axis), x.data_ptr(), scale.data_ptr(), zero_point.data_ptr(),
        quant_min, quant_max, out.data_ptr(), mask.data_ptr(),
    )  # fmt: skip
    return out, mask


@register(schema.MASK_BACKWARD, "native")
def _mask_backward(grad_out: Tensor, inside: Tensor, size: list[int], stride: list[int]) -> Tensor:
    grad_x = torch.empty_strided(size, stride, dtype=grad_out.dtype, device=grad_out.device)
    grad_out = in_order_of(grad_x, grad_out)
    native().mask_backward(
        DTYPES[grad_x.dtype], where(grad_x), grad_x.numel(), grad_out.data_ptr(), inside.data_ptr(),
        grad_x.data_ptr(),
    )  # fmt: skip
    return grad_x


def backward(grad_out: Tensor, inside: Tensor, stride: tuple[int, ...]) -> Tensor:
    """The gradient of x where the scale is given; `stride`: of the forward's `out`."""
    if (whole := whole_call("mask_backward")) is not None and (grad_x := whole(grad_out, inside, stride)) is not None:
        return grad_x
    return _mask_backward(grad_out, inside, grad_out.shape, stride)


@register(schema.BACKWARD, "native")
def backward_learned(
    grad_out: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, axis: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, scale and zero_point."""
    x, scale_values, zero_points = dense(x), fp32(scale), fp32(zero_point)
    grad_out, grad_x = in_order_of(x, grad_out), torch.empty_like(x)
    shape = view(x, axis)
    room = workspace(x, shape)
    grad_scale = torch.empty(shape[1], dtype=torch.float32, device=x.device)
    grad_zero_point = torch.empty_like(grad_scale)
    native().fake_quant_backward(
        DTYPES[x.dtype], where(x, room), *shape, grad_out.data_ptr(), x.data_ptr(),
        scale_values.data_ptr(), zero_points.data_ptr(), quant_min, quant_max, grad_x.data_ptr(),
        grad_scale.data_ptr(), grad_zero_point.data_ptr(),
    )  # fmt: skip
    return (
        grad_x,
        grad_scale.reshape(scale.shape).to(scale.dtype),
        grad_zero_point.reshape(zero_point.shape).to(zero_point.dtype),
    )
