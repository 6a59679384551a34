"""Cases of `fake_quant_conv2d`: where integers begin, geometry, groups, types, layouts, and what is no byte."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dfq_kernels.fake_quant_conv2d.api import fake_quant_conv2d
from dfq_kernels.int_conv2d.schema import out_shape
from dfq_kernels.integers import one_or_two
from dfq_kernels.specs import LAYOUTS, Case, OpSpec, nbytes, randn

Arguments = tuple[dict[str, Any], dict[str, Any]]
SCALE = 2.0**-3  # so that halves hold the values


def _case(
    name: str, shape: tuple[int, int, int, int] = (3, 16, 9, 11), weight: tuple[int, int, int, int] = (20, 16, 3, 3),
    span: tuple[int, int] = (0, 15), dtype: torch.dtype = torch.float32, *, bias: bool = True, one_scale: bool = False,
    view: Callable[[Tensor], Tensor] = Tensor.contiguous, gradients: bool = True,
    out: torch.dtype | None = None, **keywords: Any,
) -> Case:  # fmt: skip
    def make(generator: torch.Generator) -> Arguments:
        x = torch.randint(span[0], span[1] + 1, shape, generator=generator) * SCALE
        integers = torch.randint(-7, 8, weight, generator=generator)
        exponents = torch.randint(-6, -2, () if one_scale else (weight[0],), generator=generator)
        scale = torch.full(exponents.shape, 2.0) ** exponents
        tensors: dict[str, Any] = {
            "x": view(x.to(dtype)), "x_scale": torch.tensor(SCALE),
            "weight": (integers * scale.reshape(-1, 1, 1, 1)).to(dtype), "weight_scale": scale,
            "bias": randn(generator, weight[0]).to(torch.bfloat16).to(dtype) if bias else None,
        }  # fmt: skip
        return tensors, {**keywords, "dtype": out}

    return Case(name, make, gradients)


def _bytes_moved(tensors: dict[str, Any], keywords: dict[str, Any]) -> tuple[int, int]:
    """Forward: x and weight read, the result written. Backward: its gradient, x and weight read, two gradients."""
    x, weight = tensors["x"], tensors["weight"]
    geometry = [
        one_or_two(keywords.get(name, least)) for name, least in (("stride", 1), ("padding", 0), ("dilation", 1))
    ]
    results = torch.Size(out_shape(x, weight, *geometry)).numel() * (keywords["dtype"] or x.dtype).itemsize
    operands = nbytes(x, weight)
    return operands + results, results + 2 * operands


SPEC = OpSpec(
    op="fake_quant_conv2d",
    call=fake_quant_conv2d,
    differentiable=("x", "weight", "bias"),
    exact=False,
    rtol=1e-5,
    atol=1e-5,
    cases=(
        _case("unsigned", padding=1),
        _case("signed", span=(-8, 7), padding=1),
        _case("zero_point_between", span=(-77, 178), padding=1),
        _case("no_bias", bias=False),
        _case("one_scale", one_scale=True, stride=2),
        _case("three_channels", (2, 3, 17, 15), (5, 3, 7, 7), (-128, 127), stride=(2, 1), padding=(3, 2)),
        _case("pixels", (2, 24, 5, 5), (9, 24, 1, 1)),
        _case("dilated_groups", weight=(12, 4, 3, 3), groups=4, dilation=2, padding=2),
        _case("odd_groups", (2, 15, 9, 8), (10, 3, 3, 2), groups=5),
        _case("depthwise", weight=(16, 1, 3, 3), groups=16, padding=1),
        _case("no_images", (0, 16, 9, 11), gradients=False),
        _case("bf16", dtype=torch.bfloat16, padding=1),
        _case("to_bf16", out=torch.bfloat16, padding=1, gradients=False),
        _case("fp16", dtype=torch.float16, padding=1),
        *(_case(name, view=view, weight=(8, 16, 3, 3), padding=1) for name, view in LAYOUTS.items()),
    ),
    bytes_moved=_bytes_moved,
    mutations=(
        ("weight, bias, stride", "weight, None, stride"),
        ("stride, padding, dilation", "stride, [1, 1], dilation"),
        ("stride, padding, dilation", "stride, padding, [1, 1]"),
        ("dilation, groups, dtype)", "dilation, groups, x.dtype)"),
    ),
)
