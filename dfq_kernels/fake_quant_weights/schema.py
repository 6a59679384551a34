"""What every backend of `fake_quant_weights` has: arguments, results and their shapes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dfq_kernels.registration import Schema


def rows(weight: Tensor) -> Tensor:
    """A dense weight whose output channels are contiguous."""
    if weight.is_contiguous() or (weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last)):
        return weight
    return weight.contiguous()


def allocate(
    weights: Sequence[Tensor], bits: Sequence[int], dtype: torch.dtype | None
) -> tuple[list[Tensor], list[Tensor]]:
    """`(outs, scales)` in the memory order of `rows`, not yet written; dtype: of outs, None: as their weights."""
    scales = [torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device) for weight in weights]
    return [torch.empty_like(rows(weight), dtype=dtype) for weight in weights], scales


FORWARD = Schema(
    "fake_quant_weights", "(Tensor[] weights, int[] bits, ScalarType? dtype) -> (Tensor[], Tensor[])", allocate
)
