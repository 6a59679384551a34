"""`fake_quant_weights` in C++: csrc/cpu/fake_quant_weights.cpp. One call for all layers of one type."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dfq_kernels.extension import native, where
from dfq_kernels.fake_quant_weights import schema
from dfq_kernels.memory import DTYPES
from dfq_kernels.registration import register


@register(schema.FORWARD, "native")
def forward(weights: Sequence[Tensor], bits: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
    """`(outs, scales)`, one of each per weight."""
    weights = [schema.rows(weight) for weight in weights]
    outs, scales = schema.allocate(weights, bits)
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
