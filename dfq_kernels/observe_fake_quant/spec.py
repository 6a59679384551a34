"""Cases of `observe_fake_quant`: first batch, later batch, one-sided and empty ranges, non-finite batches."""

from __future__ import annotations

from typing import Any

import torch

from dfq_kernels.observe_fake_quant.api import observe_fake_quant
from dfq_kernels.specs import Case, OpSpec, fresh_range, layout_cases, mask_bytes, nbytes, randn

Arguments = tuple[dict[str, Any], dict[str, Any]]


def _random(first: bool, shift: float, **settings: Any) -> Any:
    def make(generator: torch.Generator) -> Arguments:
        dtype = settings.get("dtype", torch.float32)
        x = randn(generator, 4, 3, 17, 13) + shift
        ranges = fresh_range() if first else fresh_range(-0.75, 2.5)
        keywords = {name: value for name, value in settings.items() if name != "dtype"}
        return {"x": x.to(dtype), **ranges}, keywords

    return make


def _constant(value: float) -> Any:
    return lambda _: ({"x": torch.full((3, 5), value), **fresh_range()}, {})


def _non_finite(_: torch.Generator) -> Arguments:
    return {"x": torch.tensor([1.0, float("nan"), float("inf")]), **fresh_range(-1.0, 1.0)}, {}


def _wide(_: torch.Generator) -> Arguments:
    return {"x": torch.tensor([-2e38, 0.0, 1.0, 2e38]), **fresh_range(-3e38, 3e38)}, {"averaging_constant": 1.0}


def _nan_among_numbers(generator: torch.Generator) -> Arguments:
    """Whoever loses it on the way finds a finite range in the others."""
    x = randn(generator, 4, 3, 17, 13)
    x[1, 2, 3, 4] = float("nan")
    return {"x": x, **fresh_range(-1.0, 1.0)}, {}


def _layout(x: torch.Tensor) -> Arguments:
    return {"x": x, **fresh_range()}, {"quant_min": -8, "quant_max": 7}


def _bytes_moved(tensors: dict[str, Any], keywords: dict[str, Any]) -> tuple[int, int]:
    """Forward: a read for the range, a read and a write for the values, the mask; backward: without the first read."""
    x = tensors["x"]
    return 3 * nbytes(x) + mask_bytes(x), 2 * nbytes(x) + mask_bytes(x)


SPEC = OpSpec(
    op="observe_fake_quant",
    call=observe_fake_quant,
    differentiable=("x",),
    mutated=("running_min", "running_max", "scale", "zero_point"),
    cases=(
        Case("first_batch", _random(True, 0.0)),
        Case("later_batch", _random(False, 0.0, averaging_constant=0.1)),
        Case("positive", _random(True, 9.0, quant_max=15)),
        Case("negative", _random(True, -9.0, quant_min=-8, quant_max=7)),
        Case("symmetric", _random(False, 1.0, quant_min=-8, quant_max=7, symmetric=True)),
        Case("bf16", _random(False, 0.0, dtype=torch.bfloat16)),
        Case("fp16", _random(True, 0.0, dtype=torch.float16)),
        Case("zeros", _constant(0.0)),
        Case("constant", _constant(3.0)),
        Case("tiny", _constant(2.0**-90)),
        Case("wider_than_fp32", _wide),
        Case("non_finite", _non_finite, gradients=False),
        Case("nan_among_numbers", _nan_among_numbers, gradients=False),
        *layout_cases(_layout),
    ),
    bytes_moved=_bytes_moved,
    mutations=(
        ("running + averaging_constant * (batch - running)", "batch"),
        ("torch.where(finite, moved, running)", "moved"),
        (".clamp(-RANGE_LIMIT, RANGE_LIMIT)", ""),
        ("running_min.clamp(max=0)", "running_min"),
        ("quant_max - quant_min).clamp", "quant_max - quant_min + 1).clamp"),
        ("torch.maximum(-low, high)", "high"),
        ("(quant_min - low / new_scale).round()", "(quant_min - low / new_scale).floor()"),
        (".clamp(min=SCALE_FLOOR)\n        new_zero_point = (", "\n        new_zero_point = ("),
    ),
)
