"""What every backend of `fake_quant_conv2d` has: arguments, results and their shapes."""

from __future__ import annotations

import torch
from torch import Tensor

from dfq_kernels.int_conv2d.schema import out_shape
from dfq_kernels.registration import Schema


def allocate(
    x: Tensor, weight: Tensor, stride: list[int], padding: list[int], dilation: list[int], dtype: torch.dtype
) -> Tensor:
    """The result, channels-last, not yet written."""
    shape = out_shape(x, weight, stride, padding, dilation)
    return torch.empty(shape, dtype=dtype, device=x.device, memory_format=torch.channels_last)


def _forward(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, stride: list[int],
    padding: list[int], dilation: list[int], groups: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return allocate(x, weight, stride, padding, dilation, dtype)


FORWARD = Schema(
    "fake_quant_conv2d",
    "(Tensor x, Tensor x_scale, Tensor weight, Tensor weight_scale, Tensor? bias, int[] stride, int[] padding, "
    "int[] dilation, int groups, ScalarType dtype) -> Tensor",
    _forward,
)
