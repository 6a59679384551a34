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
from dfq_kernels.integers import Grid, QuantizedTensor, Requantize
from dfq_kernels.requantize.api import requantize
from dfq_kernels.specs import Case, OpSpec


def _call(
    x: Tensor, bits: int, on: Grid, other: Tensor | None = None, backend: str | None = None, **keywords: Any
) -> Any:
    if other is not None:
        keywords["other"] = QuantizedTensor(other, keywords.pop("other_grid"), keywords.pop("other_bits"))
    keywords["then"] = on_device(keywords.get("then"), x)
    return as_tensors(requantize(QuantizedTensor(x, on, bits), backend=backend, **keywords))


def _case(
    name: str, shape: tuple[int, ...], on: Grid, *, packed_x: bool = False, norm: bool = False, slope: bool = False,
    table: bool = False, other: tuple[int, ...] | None = None, then: str = "", **end: Any,
) -> Case:  # fmt: skip
    """other: its shape; then: what follows: a `norm`, a `slope` or a `table`."""

    def make(generator: torch.Generator) -> Arguments:
        x = integers(generator, shape, on, packed_x)
        tensors, keywords = {"x": x["q"]}, {"bits": x["bits"], "on": on, **end}
        if norm:
            tensors |= batch_norm(generator, shape[1])
        if slope:
            tensors["slope"] = torch.randn(shape[1], generator=generator)
        if table:
            tensors["table"] = 4 * torch.randn(on.levels, generator=generator)
        if other is not None:
            its = grid(4, True, scale=0.15625) if packed_x else grid(8, True, scale=0.15625)
            made = integers(generator, other, its, packed_x)
            tensors["other"] = made["q"]
            keywords |= {"other_grid": its, "other_bits": made["bits"]}
        if then:
            keywords["then"] = _following(generator, then, shape[1], end["outs"][0])
        return tensors, keywords

    return Case(name, make)


def _following(generator: torch.Generator, kind: str, channels: int, on: Grid) -> Requantize:
    if kind == "norm":
        return following(generator, channels)
    if kind == "table":
        return Requantize((grid(8), grid(2)), table=torch.randn(on.levels, generator=generator))
    return Requantize((grid(8, True),), slope=torch.randn(channels, generator=generator), activation="hardsigmoid")


SPEC = OpSpec(
    op="requantize",
    call=_call,
    differentiable=(),
    cases=(
        _case("rescale", (2, 5, 7, 3), grid(8), **ENDS["one"]),
        _case("norm", (2, 16, 5, 5), grid(8, True), norm=True, **ENDS["packed"]),
        _case("add", (3, 20), grid(4), other=(3, 20), **ENDS["one"]),
        _case(
            "everything",
            (2, 24, 3, 3),
            grid(4, True),
            packed_x=True,
            norm=True,
            slope=True,
            other=(2, 24, 3, 3),
            then="norm",
            **ENDS["packed"],
        ),
        _case("slope", (2, 6, 5, 3), grid(8, True, 5), slope=True, **ENDS["leaky"]),
        _case("table", (2, 5, 7, 3), grid(8, True), table=True, **ENDS["gated"]),
        _case("table_packed", (2, 24, 3, 5), grid(4), packed_x=True, table=True, then="table", **ENDS["packed"]),
        _case("table_real", (3, 7), grid(2, True), table=True, **ENDS["clipped"]),
        _case("then_slope", (2, 8, 3, 5), grid(8), then="slope", **ENDS["leaky"]),
        _case("add_vector", (2, 16, 3, 5), grid(4), packed_x=True, other=(2, 16), **ENDS["packed"]),
        _case("add_map", (2, 16, 3, 5), grid(4), packed_x=True, other=(2, 1, 3, 5), **ENDS["leaky"]),
        _case("product", (3, 20), grid(8), other=(3, 20), product_scale=0.01, **ENDS["gated"]),
        _case(
            "product_vector",
            (2, 7, 5, 3),
            grid(8, True),
            other=(2, 7, 1, 1),
            product_scale=0.01,
            then="norm",
            **ENDS["one"],
        ),
        _case(
            "product_packed", (3, 16, 1, 5), grid(2), packed_x=True, other=(3, 16), product_scale=0.3, **ENDS["packed"]
        ),
        _case("product_map", (2, 7, 5, 3), grid(8), other=(2, 1, 5, 3), product_scale=0.01, **ENDS["real"]),
        _case("packed_u2", (2, 36, 3, 5), grid(2), packed_x=True, **ENDS["one"]),
        _case("dequantize", (2, 6, 3, 5), grid(4, True), packed_x=True, **ENDS["real"]),
        _case("empty", (0, 6, 3, 5), grid(8), **ENDS["one"]),
    ),
    bytes_moved=lambda tensors, keywords: bytes_moved(
        tensors, keywords, tensors["x"].numel() // tensors["x"].shape[1], tensors["x"].shape[1] * 8 // keywords["bits"]
    ),
    mutations=(
        (" + quantize.real(r, others)", ""),
        ("- others.zero_point) * product_scale", ") * product_scale"),
        (" * product_scale", ""),
        ("t = normalized(real(q, grid), *given.norm)", "t = real(q, grid)"),
        ("per_channel(given.slope, t) * t", "t"),
        ("(q.long() - grid.quant_min)", "q.long()"),
        (".clamp(0, grid.levels - 1)", ""),
        ("(t - mean) * mult + bias", "t * mult + bias"),
        ("(q.float() - grid.zero_point) * grid.scale", "q.float() * grid.scale"),
        ("meant(values[0], epilogue.outs[0], epilogue.then.constants)", "t"),
    ),
)
