"""Cases of `requantize`: storage in and out, batch norms, additions, what follows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dfq_kernels.integer_cases import (
    ENDS,
    Arguments,
    as_tensors,
    batch_norm,
    bytes_moved,
    following,
    grid,
    integers,
    on_device,
)
from dfq_kernels.integers import Grid, QuantizedTensor
from dfq_kernels.requantize.api import requantize
from dfq_kernels.specs import Case, OpSpec


def _call(
    x: Tensor, bits: int, on: Grid, other: Tensor | None = None, backend: str | None = None, **keywords: Any
) -> Any:
    if other is not None:
        keywords["other"] = QuantizedTensor(other, keywords.pop("other_grid"), 8)
    keywords["then"] = on_device(keywords.get("then"), x)
    return as_tensors(requantize(QuantizedTensor(x, on, bits), backend=backend, **keywords))


def _case(
    name: str, shape: tuple[int, ...], on: Grid, *, packed_x: bool = False, norm: bool = False, add: bool = False,
    then: bool = False, **end: Any,
) -> Case:  # fmt: skip
    def make(generator: torch.Generator) -> Arguments:
        x = integers(generator, shape, on, packed_x)
        tensors, keywords = {"x": x["q"]}, {"bits": x["bits"], "on": on, **end}
        if norm:
            tensors |= batch_norm(generator, shape[1])
        if add:
            tensors["other"] = integers(generator, shape, grid(8, True))["q"]
            keywords["other_grid"] = grid(8, True, scale=0.15625)
        if then:
            keywords["then"] = following(generator, shape[1])
        return tensors, keywords

    return Case(name, make)


SPEC = OpSpec(
    op="requantize",
    call=_call,
    differentiable=(),
    cases=(
        _case("rescale", (2, 5, 7, 3), grid(8), **ENDS["one"]),
        _case("norm", (2, 16, 5, 5), grid(8, True), norm=True, **ENDS["packed"]),
        _case("add", (3, 20), grid(4), add=True, **ENDS["one"]),
        _case(
            "everything", (2, 24, 3, 3), grid(4, True), packed_x=True, norm=True, add=True, then=True, **ENDS["packed"]
        ),
        _case("packed_u2", (2, 36, 3, 5), grid(2), packed_x=True, **ENDS["one"]),
        _case("dequantize", (2, 6, 3, 5), grid(4, True), packed_x=True, **ENDS["real"]),
        _case("empty", (0, 6, 3, 5), grid(8), **ENDS["one"]),
    ),
    bytes_moved=lambda tensors, keywords: bytes_moved(
        tensors, keywords, tensors["x"].numel() // tensors["x"].shape[1], tensors["x"].shape[1] * 8 // keywords["bits"]
    ),
    mutations=(
        ("t = t + _real(other, other_grid)", "pass"),
        ("quantize.normalized(_real(x, x_grid), *norm)", "_real(x, x_grid)"),
        ("(t - mean) * mult + bias", "t * mult + bias"),
        ("(q.float() - grid.zero_point) * grid.scale", "q.float() * grid.scale"),
        ("real(values[0], epilogue.outs[0])", "t"),
    ),
)
