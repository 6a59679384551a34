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
LEAVES = (
    f"layers of under {LEAST_PIXELS} output pixels, groups of under {LEAST_CHANNELS} channels, "
    "and values that are no bytes"
)


def leaves(x: Tensor, weight: Tensor, stride: list[int], padding: list[int], dilation: list[int], groups: int) -> bool:
    """Whether torch's floats are faster than integers (docs/LOG.md has both sides of each bound)."""
    count, _, height, width = out_shape(x, weight, stride, padding, dilation)
    channels = weight.shape[1]
    fills = groups == 1 or (channels >= LEAST_CHANNELS and channels % 4 == 0)
    return not fills or count * height * width < LEAST_PIXELS


@register(schema.FORWARD, "native")
def forward(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, stride: list[int],
    padding: list[int], dilation: list[int], groups: int, dtype: torch.dtype, strict: bool,
) -> Tensor:  # fmt: skip
    """Sums of integers in int32, then `float(acc) * (x_scale * weight_scale[c]) + bias[c]`.

    Where integers do not fit a byte (NaN, 9 bits and more) or their sums int32, the values' own convolution; if
    `strict` a ValueError.
    """
    out = schema.allocate(x, weight, stride, padding, dilation, dtype)
    geometry = stride, padding, dilation, groups
    if not out.numel():
        return out
    if 255 * 128 * weight[0].numel() > LARGEST_SUM:
        _refuse_if(strict, "weight", "of rows whose sums int32 holds", f"{weight[0].numel()} products")
        return out.copy_(convolve(x, weight, bias, *geometry, dtype))
    last = out.is_contiguous(memory_format=torch.channels_last)
    made = out if last else torch.empty_like(out, memory_format=torch.channels_last)
    if not _by_integers(x, x_scale, weight, weight_scale, bias, geometry, made):
        span = float(x.detach().float().amax() - x.detach().float().amin()) / float(x_scale)
        rule = "multiples of x_scale in a span of 256 (bf16: in +-127), with a normal product of scales,"
        _refuse_if(strict, "x", f"{rule} where backend is native", f"a span of {span:.4g}")
        return out.copy_(convolve(x, weight, bias, *geometry, dtype))
    return out if last else out.copy_(made)


def _refuse_if(strict: bool, name: str, rule: str, got: str) -> None:
    """An explicit choice of this backend never falls back to torch's floats."""
    if strict:
        raise ValueError(f"fake_quant_conv2d: {name} must be {rule}, got {got}")


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
