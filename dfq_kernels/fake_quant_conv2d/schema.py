"""What every backend of `fake_quant_conv2d` has: arguments, results and their shapes."""

from __future__ import annotations

import torch
from torch import Tensor

from dfq_kernels.int_conv2d.schema import out_shape
from dfq_kernels.memory import layout_of
from dfq_kernels.registration import Schema


def allocate(
    x: Tensor, weight: Tensor, stride: list[int], padding: list[int], dilation: list[int], dtype: torch.dtype
) -> Tensor:
    """The result, not yet written: channels-last where x or weight is, as torch's convolutions do."""
    shape = out_shape(x, weight, stride, padding, dilation)
    layout = layout_of(x) if layout_of(x) == torch.channels_last else layout_of(weight)
    return torch.empty(shape, dtype=dtype, device=x.device, memory_format=layout)


def _forward(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, stride: list[int],
    padding: list[int], dilation: list[int], groups: int, dtype: torch.dtype, strict: bool,
) -> Tensor:  # fmt: skip
    return allocate(x, weight, stride, padding, dilation, dtype)


FORWARD = Schema(
    "fake_quant_conv2d",
    "(Tensor x, Tensor x_scale, Tensor weight, Tensor weight_scale, Tensor? bias, int[] stride, int[] padding, "
    "int[] dilation, int groups, ScalarType dtype, bool strict) -> Tensor",
    _forward,
)
