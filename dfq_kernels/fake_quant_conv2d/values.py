"""The convolution of the values themselves and its gradients: torch's own, in the type of the result."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F

from dfq_kernels.processor import fast_at_bf16

FAST_AT_BF16 = fast_at_bf16()  # asked once


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """`F.conv2d` of the values in `dtype`, whatever autocast says."""
    kind = x.device.type
    with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext():
        shift = None if bias is None else _multiplied(bias.to(dtype))
        x, weight = _multiplied(x.to(dtype)), _multiplied(weight.to(dtype))
        return F.conv2d(x, weight, shift, stride, padding, dilation, groups).to(dtype)


def _multiplied(values: Tensor) -> Tensor:
    """In the type that they are multiplied in. The products of two bf16 numbers are exact in fp32: a processor that is
    slower at bf16 multiplies fp32."""
    return values.float() if values.dtype == torch.bfloat16 and values.is_cpu and not FAST_AT_BF16 else values


def gradients(
    grad_out: Tensor, x: Tensor, weight: Tensor, geometry: tuple[list[int], list[int], list[int], int],
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Of x, weight and bias, those that are wanted, in their types (of the bias in the weight's).

    x and weight are rounded to the type of `grad_out` first, as autocast does.
    """
    stride, padding, dilation, groups = geometry
    operands = [_multiplied(value.to(grad_out.dtype)) for value in (grad_out, x, weight)]
    found = torch.ops.aten.convolution_backward(
        *operands, [len(weight)], stride, padding, dilation, False, [0, 0], groups, list(wanted)
    )
    types = (x.dtype, weight.dtype, weight.dtype)
    return tuple(grad if grad is None else grad.to(dtype) for grad, dtype in zip(found, types, strict=True))
