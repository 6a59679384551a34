"""`fake_quant_weights` in C++: csrc/cpu/fake_quant_weights.cpp. One call for all layers of one type."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dfq_kernels.extension import DTYPES, native, register, where


def _rows(weight: Tensor) -> Tensor:
    """A dense weight whose output channels are contiguous."""
    if weight.is_contiguous() or (weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last)):
        return weight
    return weight.contiguous()


def _allocate(weights: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    scales = [torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device) for weight in weights]
    return [torch.empty_like(weight) for weight in weights], scales


def _fake(weights: Sequence[Tensor], bits: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
    return _allocate(weights)


@register("fake_quant_weights(Tensor[] weights, int[] bits) -> (Tensor[], Tensor[])", _fake)
def forward(weights: Sequence[Tensor], bits: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
    """`(outs, scales)`, one of each per weight."""
    weights = [_rows(weight) for weight in weights]
    outs, scales = _allocate(weights)
    for dtype in {weight.dtype for weight in weights}:
        chosen = [index for index, weight in enumerate(weights) if weight.dtype == dtype]
        native().fake_quant_weights(
            DTYPES[dtype], where(weights[0]), [weights[index].data_ptr() for index in chosen],
            [weights[index].shape[0] for index in chosen],
            [weights[index].numel() // weights[index].shape[0] for index in chosen],
            [bits[index] for index in chosen], [outs[index].data_ptr() for index in chosen],
            [scales[index].data_ptr() for index in chosen],
        )  # fmt: skip
    return outs, scales
