"""The convolution of fake-quantized values in plain PyTorch, with its gradients: this file defines the operator."""

from __future__ import annotations

import torch
from torch import Tensor

from dfq_kernels.fake_quant_conv2d.values import convolve


def forward(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, stride: list[int],
    padding: list[int], dilation: list[int], groups: int, dtype: torch.dtype, strict: bool,
) -> Tensor:  # fmt: skip
    """`conv2d(x, weight) + bias`: in real numbers the scales are in the values already."""
    return convolve(x, weight, bias, stride, padding, dilation, groups, dtype)
