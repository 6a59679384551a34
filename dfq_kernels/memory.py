"""Dense tensors as kernels see them: `(size, channels, inner)`, element i in memory order belonging to channel
`i // inner % channels`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# what kernels store and what they know behind a batch norm, with their codes (csrc/common/types.h)
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ACTIVATIONS = {None: 0, "relu": 1, "relu6": 2}


def dense(x: Tensor) -> Tensor:
    """`x`, or a copy of it, whose elements fill their memory without gaps or overlaps and are what is stored there."""
    x = x.resolve_neg()  # the imaginary part of a conjugate is negated by a flag
    if x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)):
        return x
    if torch.ops.aten.is_non_overlapping_and_dense(x):
        return x
    return x.clone(memory_format=torch.preserve_format)


def layout_of(x: Tensor) -> torch.memory_format:
    """Channels-last or contiguous, as torch's convolutions see `[N, C, H, W]`; where sides are 1 by strides alone."""
    shape, strides, least = x.shape, x.stride(), 1
    for axis in (1, 3, 2, 0):
        if strides[axis] < least or shape[axis] == 0 or (axis == 0 and least == strides[1]):
            return torch.contiguous_format
        least = strides[axis] * shape[axis]
    return torch.channels_last


def view(x: Tensor, axis: int | None) -> tuple[int, int, int]:
    """`(size, channels, inner)` of a dense tensor."""
    size = x.numel()
    if axis is None or x.shape[axis] == 1:
        return size, 1, size
    return size, x.shape[axis], x.stride(axis)


def in_order_of(x: Tensor, other: Tensor) -> Tensor:
    """`other` with the type and the memory order of the dense `x`."""
    if other._is_zerotensor():  # zeros that autograd has not written down
        return torch.zeros_like(x)
    if other.stride() == x.stride() and other.dtype == x.dtype:
        return other.resolve_neg()
    return torch.empty_like(x).copy_(other)


def fp32(values: Tensor) -> Tensor:
    """Contiguous fp32."""
    values = values.resolve_neg()
    return values if values.dtype == torch.float32 and values.is_contiguous() else values.float().contiguous()


def optional(values: Tensor | None) -> Tensor | None:
    """`fp32` of what may be None."""
    return None if values is None else fp32(values)


class Updated:
    """fp32 copies, where they are not fp32 themselves, of tensors that a kernel updates; written back by `done`.

    Args:
        tensors: what the kernel reads.
        written: whether it updates them, too; if not they are left alone.
    """

    def __init__(self, tensors: Sequence[Tensor], written: bool = True) -> None:
        self.tensors, self.written = tensors, written
        self.values = [fp32(tensor) for tensor in tensors]

    def done(self) -> None:
        for tensor, value in zip(self.tensors, self.values, strict=True):
            if self.written and value.data_ptr() != tensor.data_ptr():
                tensor.copy_(value)


def shaped(values: Tensor, other: Tensor) -> Tensor:
    """`values` in the shape of `other`."""
    return values if values.shape == other.shape else values.reshape(other.shape)


def mask_like(x: Tensor) -> Tensor:
    """Room for one bit per element, in whole pairs of bytes."""
    return x.new_empty((x.numel() + 15) // 16 * 2, dtype=torch.uint8)
