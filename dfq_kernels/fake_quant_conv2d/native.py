"""`fake_quant_conv2d` in C++, by integers: csrc/cpu/fake_quant_conv2d.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from dfq_kernels._integer_checks import LARGEST_SUM
from dfq_kernels.extension import address, native
from dfq_kernels.fake_quant_conv2d import schema
from dfq_kernels.fake_quant_conv2d.values import convolve, gradients
from dfq_kernels.memory import DTYPES, fp32, optional
from dfq_kernels.registration import register


@register(schema.FORWARD, "native")
def forward(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, stride: list[int],
    padding: list[int], dilation: list[int], groups: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Sums of integers in int32, then `float(acc) * (x_scale * weight_scale[c]) + bias[c]`.

    The values' own convolution where integers do not fit a byte (NaN, 9 bits and more) or their sums int32.
    """
    out = schema.allocate(x, weight, stride, padding, dilation, dtype)
    if not out.numel() or 255 * 128 * weight[0].numel() > LARGEST_SUM:
        return out.copy_(convolve(x, weight, bias, stride, padding, dilation, groups, dtype))
    x = x.resolve_neg().contiguous(memory_format=torch.channels_last)
    weight = fp32(weight).contiguous(memory_format=torch.channels_last)
    x_scale, weight_scale, bias = fp32(x_scale), fp32(weight_scale), optional(bias)
    sides = [*x.shape[2:], x.shape[1], *out.shape[2:], out.shape[1], *weight.shape[2:]]
    fits = native().fake_quant_conv2d(
        DTYPES[x.dtype], DTYPES[dtype], torch.get_num_threads(), len(x), sides, [*stride, *padding, *dilation], groups,
        x.data_ptr(), x_scale.data_ptr(), weight.data_ptr(), weight_scale.data_ptr(), address(bias), out.data_ptr(),
    )  # fmt: skip
    return out if fits else out.copy_(convolve(x, weight, bias, stride, padding, dilation, groups, dtype))


backward = gradients
