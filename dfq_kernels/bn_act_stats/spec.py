"""Cases of `bn_act_stats`: activations, with and without parameters, types, layouts."""

from __future__ import annotations

from typing import Any

import torch

from dfq_kernels.bn_act_stats.api import bn_act_stats
from dfq_kernels.specs import Case, OpSpec, batch_norm, layout_cases, nbytes, randn

Arguments = tuple[dict[str, Any], dict[str, Any]]


def _random(activation: str | None, dtype: torch.dtype = torch.float32, affine: bool = True, spread: float = 1) -> Any:
    def make(generator: torch.Generator) -> Arguments:
        x = randn(generator, 4, 16, 9, 7, scale=spread).to(dtype)
        parameters = batch_norm(generator, 16)
        if not affine:
            parameters |= {"weight": None, "bias": None}
        return {"x": x, **parameters}, {"activation": activation}

    return make


def _layout(x: torch.Tensor) -> Arguments:
    return {"x": x, **batch_norm(torch.Generator().manual_seed(1), x.shape[1])}, {}


SPEC = OpSpec(
    op="bn_act_stats",
    call=bn_act_stats,
    differentiable=("x",),
    exact=False,
    rtol=1e-5,
    atol=1e-6,
    cases=(
        Case("relu", _random("relu")),
        Case("relu6", _random("relu6", spread=9)),
        Case("identity", _random(None)),
        Case("no_parameters", _random("relu", affine=False)),
        Case("bf16", _random("relu", torch.bfloat16)),
        Case("fp16", _random("relu", torch.float16)),
        *layout_cases(_layout),
    ),
    bytes_moved=lambda tensors, _: (2 * nbytes(tensors["x"]), 3 * nbytes(tensors["x"])),
    mutations=(
        ("torch.rsqrt(var + eps)", "torch.rsqrt(var)"),
        ("inv_std if weight is None else weight * inv_std", "inv_std"),
        ("out.clamp_(0, 6)", "out.relu_()"),
        ("hardtanh_backward(grad, out, 0, 6)", "threshold_backward(grad, out, 0)"),
        ("threshold_backward(grad, out, 0)", "threshold_backward(grad, out, -1)"),
        ("grad_out * factor + bn_stats.backward", "bn_stats.backward"),
    ),
)
