"""Public function of the operator: checks and autograd."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from dfq_kernels._checks import FLOATS, check_device, check_float, widest
from dfq_kernels._eager import once, recorded
from dfq_kernels._integer_checks import require
from dfq_kernels.dispatch import resolve

OP = "fake_quant_weights"


def fake_quant_weights(
    weights: Sequence[Tensor], bits: int | Sequence[int], *, dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> tuple[list[Tensor], list[Tensor]]:  # fmt: skip
    """Fake-quantizes the weights of all layers in one call, per output channel and symmetric.

        quant_max = 2^(bits - 1) - 1,  scale[c] = max(|weight[c]|) / quant_max  (at least 2^-63)
        out[c] = clamp(rne(weight[c] * (1 / scale[c])), -quant_max, quant_max) * scale[c]

    The range is the weight's own, so nothing is clipped and the straight-through gradient is the identity; the scales
    have no gradient.

    Args:
        weights: tensors `[out_channels, ...]` of one device; float32, bfloat16 or float16; not empty.
        bits: 2 to 8, one for all or one per weight.
        dtype: of the fake-quantized weights, rounded once from fp32 (what a cast behind it would give); None: each
            weight's own. Gradients have the weights' types.
        backend: `native`, `triton` or `reference`; None takes the best that is there.

    Returns:
        `(outs, scales)`: per weight a tensor of its shape, and the fp32 scales `[out_channels]`.

    Raises:
        ValueError: no weights, a wrong shape, dtype, device or number of bits.
        BackendError: an explicit backend that is not there.

    Source: Krishnamoorthi 2018 (arXiv 1806.08342) sections 2.2 and 3.1.
    """
    weights = list(weights)
    if not weights:
        raise ValueError(f"{OP}: weights must hold at least one tensor, got none")
    counts = [bits] * len(weights) if isinstance(bits, int) else list(bits)
    if len(counts) != len(weights):
        raise ValueError(f"{OP}: bits must be one number or {len(weights)}, got {len(counts)}")
    for index, (weight, count) in enumerate(zip(weights, counts, strict=True)):
        check_float(OP, f"weights[{index}]", weight)
        check_device(OP, f"weights[{index}]", weight, weights[0])
        if weight.dim() < 2 or weight.numel() == 0:
            raise ValueError(f"{OP}: weights[{index}] must be [out_channels, ...], got shape {tuple(weight.shape)}")
        if isinstance(count, bool) or not isinstance(count, int) or not 2 <= count <= 8:
            raise ValueError(f"{OP}: bits must be in [2, 8], got {count!r}")
    require(OP, dtype is None or dtype in FLOATS, "dtype", "float32, bfloat16, float16 or float64", dtype)
    like = weights[0].new_empty(0, dtype=dtype) if dtype == torch.float64 else widest(weights)
    impl = resolve(OP, backend, like)
    if not recorded(*weights):
        return impl.forward(weights, counts, dtype)
    results = FakeQuantWeights.apply(counts, dtype, impl, *weights)
    return list(results[: len(weights)]), list(results[len(weights) :])


class FakeQuantWeights(torch.autograd.Function):
    """Gradient of `fake_quant_weights`: the identity."""

    @staticmethod
    def forward(
        ctx: Any, bits: list[int], dtype: torch.dtype | None, impl: ModuleType, *weights: Tensor
    ) -> tuple[Tensor, ...]:
        outs, scales = impl.forward(weights, bits, dtype)
        ctx.types = [weight.dtype for weight in weights]
        ctx.mark_non_differentiable(*scales)
        ctx.set_materialize_grads(False)  # zeros for the scales, which nobody reads
        return *outs, *scales

    @staticmethod
    @once
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, None, None, *_in_types(grads[: len(grads) // 2], ctx.types)


def _in_types(grads: Sequence[Tensor | None], types: list[torch.dtype]) -> list[Tensor | None]:
    """Gradients in the weights' types: those of another are copied all at once."""
    results = list(grads)
    others = {index: grad for index, grad in enumerate(grads) if grad is not None and grad.dtype != types[index]}
    if others:
        made = [torch.empty_like(grad, dtype=types[index]) for index, grad in others.items()]
        torch._foreach_copy_(made, list(others.values()))
        for index, grad in zip(others, made, strict=True):
            results[index] = grad
    return results
