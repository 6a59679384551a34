"""Cases of `bn_stats`: layouts, types, a mean far from 0, one value per channel."""

from __future__ import annotations

from typing import Any

import torch

from dfq_kernels.bn_stats.api import bn_stats
from dfq_kernels.specs import Case, OpSpec, layout_cases, nbytes, randn

Arguments = tuple[dict[str, Any], dict[str, Any]]


def _random(*shape: int, dtype: torch.dtype = torch.float32, shift: float = 0.0) -> Any:
    return lambda generator: ({"x": (randn(generator, *shape) + shift).to(dtype)}, {})


SPEC = OpSpec(
    op="bn_stats",
    call=bn_stats,
    differentiable=("x",),
    exact=False,
    rtol=1e-5,
    atol=1e-6,
    cases=(
        Case("maps", _random(4, 16, 17, 13)),
        Case("mean_1e4", _random(8, 3, 31, 29, shift=1e4)),
        Case("rows", _random(64, 10)),
        Case("many_rows", _random(4291, 256)),  # enough for a GPU's threads to look at four at once
        Case("sequence", _random(4, 5, 33)),
        Case("one_value", _random(1, 6, 1, 1)),
        Case("bf16", _random(4, 16, 17, 13, dtype=torch.bfloat16)),
        Case("fp16", _random(4, 16, 17, 13, dtype=torch.float16)),
        *layout_cases(lambda x: ({"x": x}, {})),
    ),
    bytes_moved=lambda tensors, _: (nbytes(tensors["x"]), 2 * nbytes(tensors["x"])),
    mutations=(
        ("(arithmetic - per_axis(mean, x, 1)).square_()", "arithmetic.square()"),
        ("2 / count * grad_var", "1 / count * grad_var"),
        ("grad_mean / count", "grad_mean"),
        ("if dim != 1]\n    arithmetic", "if dim != 0]\n    arithmetic"),
    ),
)
