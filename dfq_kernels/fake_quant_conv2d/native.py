"""`fake_quant_conv2d` in C++, by integers: csrc/cpu/fake_quant_conv2d.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from dfq_kernels._integer_checks import LARGEST_SUM, Geometry
from dfq_kernels.extension import address, native
from dfq_kernels.fake_quant_conv2d import schema
from dfq_kernels.fake_quant_conv2d.values import convolve, gradients
from dfq_kernels.int_conv2d.schema import out_shape
from dfq_kernels.memory import DTYPES, fp32, optional
from dfq_kernels.registration import register

LEAST_PIXELS = 256  # of all results' maps; with fewer, packing a weight costs more than its products save
LEAST_CHANNELS = 16  # of a group


def pays(x: Tensor, weight: Tensor, stride: list[int], padding: list[int], dilation: list[int], groups: int) -> bool:
    """Whether integers are faster than torch's floats (docs/LOG.md has both sides of each bound)."""
    count, _, height, width = out_shape(x, weight, stride, padding, dilation)
    channels = weight.shape[1]
    fills = groups == 1 or (channels >= LEAST_CHANNELS and channels % 4 == 0)
    return fills and count * height * width >= LEAST_PIXELS


@register(schema.FORWARD, "native")
def forward(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, stride: list[int],
    padding: list[int], dilation: list[int], groups: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Sums of integers in int32, then `float(acc) * (x_scale * weight_scale[c]) + bias[c]`.

    The values' own convolution where integers do not fit a byte (NaN, 9 bits and more) or their sums int32.
    """
    out = schema.allocate(x, weight, stride, padding, dilation, dtype)
    geometry = stride, padding, dilation, groups
    if not out.numel() or 255 * 128 * weight[0].numel() > LARGEST_SUM:
        return out.copy_(convolve(x, weight, bias, *geometry, dtype))
    last = out.is_contiguous(memory_format=torch.channels_last)
    made = out if last else torch.empty_like(out, memory_format=torch.channels_last)
    if not _by_integers(x, x_scale, weight, weight_scale, bias, geometry, made):
        return out.copy_(convolve(x, weight, bias, *geometry, dtype))
    return out if last else out.copy_(made)


def _by_integers(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, geometry: Geometry,
    out: Tensor,
) -> bool:  # fmt: skip
    """Writes to `out`, which is channels-last; False where an integer does not fit."""
    stride, padding, dilation, groups = geometry
    x = x.resolve_neg().contiguous(memory_format=torch.channels_last)
    weight = fp32(weight).contiguous(memory_format=torch.channels_last)
    x_scale, weight_scale, bias = fp32(x_scale), fp32(weight_scale), optional(bias)
    sides = [*x.shape[2:], x.shape[1], *out.shape[2:], out.shape[1], *weight.shape[2:]]
    fits: bool = native().fake_quant_conv2d(
        DTYPES[x.dtype], DTYPES[out.dtype], torch.get_num_threads(), len(x), sides, [*stride, *padding, *dilation],
        groups, x.data_ptr(), x_scale.data_ptr(), weight.data_ptr(), weight_scale.data_ptr(), address(bias),
        out.data_ptr(),
    )  # fmt: skip
    return fits


backward = gradients
