"""`fake_quant_weights` in C++: csrc/cpu/fake_quant_weights.cpp. One call for all layers of one type."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dfq_kernels.extension import native, where
from dfq_kernels.fake_quant_weights import schema
from dfq_kernels.memory import DTYPES
from dfq_kernels.registration import register


@register(schema.FORWARD, "native")
def forward(
    weights: Sequence[Tensor], bits: Sequence[int], dtype: torch.dtype | None
) -> tuple[list[Tensor], list[Tensor]]:
    """`(outs, scales)`, one of each per weight."""
    weights = [schema.rows(weight) for weight in weights]
    outs, scales = schema.allocate(weights, bits, dtype)
    for types in {(weight.dtype, out.dtype) for weight, out in zip(weights, outs, strict=True)}:
        chosen = [index for index, weight in enumerate(weights) if (weight.dtype, outs[index].dtype) == types]
        native().fake_quant_weights(
            *(DTYPES[kind] for kind in types), where(weights[0]), [weights[index].data_ptr() for index in chosen],
            [weights[index].shape[0] for index in chosen],
            [weights[index].numel() // weights[index].shape[0] for index in chosen],
            [bits[index] for index in chosen], [outs[index].data_ptr() for index in chosen],
            [scales[index].data_ptr() for index in chosen],
        )  # fmt: skip
    return outs, scales
