"""Cases of `fake_quant`: one per branch of the maths, ties above all."""

from __future__ import annotations

from typing import Any

import torch

from dfq_kernels.fake_quant.api import fake_quant
from dfq_kernels.specs import Case, OpSpec, layout_cases, mask_bytes, nbytes, randn

Arguments = tuple[dict[str, Any], dict[str, Any]]


def _ties(_: torch.Generator) -> Arguments:
    """Every half between the bounds, and just beyond them; an odd zero point moves the ties."""
    x = torch.arange(-24, 25) / 2 * 0.25
    return {"x": x, "scale": torch.tensor(0.25), "zero_point": torch.tensor(3.0)}, {"quant_min": -8, "quant_max": 7}


def _special(_: torch.Generator) -> Arguments:
    x = torch.tensor([float("nan"), float("inf"), float("-inf"), 3e38, -3e38, 0.0, -0.0, 1e-45])
    return {"x": x, "scale": torch.tensor(1e-3), "zero_point": torch.tensor(0.0)}, {"quant_min": 0, "quant_max": 15}


def _bounds(largest: int) -> Any:
    """About both bounds, where a sum with a power of two may have no place left for what is rounded."""

    def make(_: torch.Generator) -> Arguments:
        edge = torch.arange(-6, 7) / 4 + largest
        x = torch.cat((edge, -edge, torch.tensor([0.5, -1.5, 2.0**25 + 4, -3e38])))
        tensors = {"x": x, "scale": torch.tensor(1.0), "zero_point": torch.tensor(0.0)}
        return tensors, {"quant_min": -largest, "quant_max": largest}

    return make


def _random(dtype: torch.dtype, scale: float, bounds: tuple[int, int], zero_point: float) -> Any:
    def make(generator: torch.Generator) -> Arguments:
        x = randn(generator, 4, 3, 17, 13, dtype=dtype)
        tensors = {"x": x, "scale": torch.tensor(scale), "zero_point": torch.tensor(zero_point)}
        return tensors, {"quant_min": bounds[0], "quant_max": bounds[1]}

    return make


def _axis(axis: int, shape: tuple[int, ...] = (5, 7, 3, 11)) -> Any:
    def make(generator: torch.Generator) -> Arguments:
        x = randn(generator, *shape)
        channels = x.shape[axis]
        scale = torch.rand(channels, generator=generator) * 0.2 + 0.01
        zero_point = torch.randint(-3, 4, (channels,), generator=generator).float()
        return {"x": x, "scale": scale, "zero_point": zero_point}, {"quant_min": -8, "quant_max": 7, "axis": axis}

    return make


def _layout(x: torch.Tensor) -> Arguments:
    tensors = {"x": x, "scale": torch.tensor(0.1), "zero_point": torch.tensor(2.0)}
    return tensors, {"quant_min": 0, "quant_max": 15}


def _bytes_moved(tensors: dict[str, Any], keywords: dict[str, Any]) -> tuple[int, int]:
    """One read, one write and the mask; with a learned scale no mask, and x again in the backward."""
    x = tensors["x"]
    if any(isinstance(value, torch.Tensor) and value.requires_grad for name, value in tensors.items() if name != "x"):
        return 2 * nbytes(x), 3 * nbytes(x)
    return (2 * nbytes(x) + mask_bytes(x),) * 2


def _not_above_0(generator: torch.Generator) -> Arguments:
    tensors = {
        "x": randn(generator, 4, 33),
        "scale": torch.tensor([0.1, 0.0, -0.1, float("nan")]),
        "zero_point": torch.zeros(4),
    }
    return tensors, {"quant_min": -8, "quant_max": 7, "axis": 0}


def _empty(_: torch.Generator) -> Arguments:
    return {"x": torch.empty(0, 3), "scale": torch.tensor(1.0), "zero_point": torch.tensor(0.0)}, {}


SPEC = OpSpec(
    op="fake_quant",
    call=fake_quant,
    differentiable=("x", "scale", "zero_point"),
    cases=(
        Case("ties", _ties),
        Case("special", _special, gradients=False),
        Case("empty", _empty, gradients=False),
        Case("scale_not_above_0", _not_above_0, gradients=False),
        *(Case(f"bounds{largest}", _bounds(largest)) for largest in (2**22 - 1, 2**22, 2**23 - 1, 2**23)),
        Case("fp32_s8", _random(torch.float32, 0.02, (-128, 127), 0.0)),
        Case("fp32_u4", _random(torch.float32, 0.11, (0, 15), 5.0)),
        Case("fp32_s2", _random(torch.float32, 0.7, (-2, 1), 0.0)),
        Case("bf16_u4", _random(torch.bfloat16, 0.11, (0, 15), 5.0)),
        Case("fp16_s8", _random(torch.float16, 0.02, (-128, 127), -7.0)),
        *(Case(f"axis{axis}", _axis(axis)) for axis in (0, 1, -1)),
        Case("only_axis", _axis(0, (37,))),
        *layout_cases(_layout),
    ),
    bytes_moved=_bytes_moved,
    mutations=(
        (".round_()", ".add_(0.5).floor_()"),
        (".to(scale.dtype) * reciprocal(scale)", ".to(scale.dtype) / scale"),
        ('torch.where(scale > 0, 1 / scale, float("nan"))', "1 / scale"),
        ("x.to(scale.dtype) * recip", "x * recip"),
        ("inside = q == rounded", "inside = q != rounded"),
        (".add_(zero_point).round_()", ".round_().add_(zero_point)"),
        ("q.sub_(zero_point_b).sub_(scaled.mul_(inside))", "q.sub_(zero_point_b)"),
        ("grad_inside - grad, axis", "grad - grad_inside, axis"),
        ("error.mul_(grad)", "error.mul_(grad_inside)"),
        ("return q.sub_(zero_point).mul_(scale)", "return q.mul_(scale)"),
    ),
)
