"""Cases of `int_resize`: to more and to less, the same place twice, in every storage."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dfq_kernels.int_resize.api import int_resize
from dfq_kernels.integer_cases import ENDS, Arguments, as_tensors, bytes_moved, grid, integers
from dfq_kernels.integers import Grid, QuantizedTensor
from dfq_kernels.specs import Case, OpSpec


def _call(x: Tensor, bits: int, on: Grid, backend: str | None = None, **keywords: Any) -> Any:
    return as_tensors(int_resize(QuantizedTensor(x, on, bits), backend=backend, **keywords))


def _case(
    name: str, shape: tuple[int, int, int, int], size: tuple[int, int], on: Grid, *, packed_x: bool = False, **end: Any
) -> Case:
    def make(generator: torch.Generator) -> Arguments:
        x = integers(generator, shape, on, packed_x)
        tensors = {"x": x["q"]}
        for axis, side, out in zip(("row", "column"), shape[2:], size, strict=True):
            places = torch.randint(0, side, (2, out), generator=generator)
            tensors |= {f"{axis}s": places.int(), f"{axis}_weights": torch.rand(out, generator=generator)}
        return tensors, {"bits": x["bits"], "on": on, **end}

    return Case(name, make)


def _bytes_moved(tensors: dict[str, Any], keywords: dict[str, Any]) -> tuple[int, int]:
    x, pixels = tensors["x"], tensors["rows"].shape[1] * tensors["columns"].shape[1]
    return bytes_moved(tensors, keywords, len(x) * pixels, x.shape[1] * 8 // keywords["bits"])


SPEC = OpSpec(
    op="int_resize",
    call=_call,
    differentiable=(),
    cases=(
        _case("twice", (2, 5, 4, 3), (8, 6), grid(8), **ENDS["one"]),
        _case("smaller", (2, 16, 9, 7), (4, 5), grid(8, True, 100), **ENDS["gated"]),
        _case("packed", (2, 24, 3, 5), (5, 7), grid(4, True), packed_x=True, **ENDS["packed"]),
        _case("packed_u2", (1, 36, 3, 3), (4, 1), grid(2), packed_x=True, **ENDS["leaky"]),
        _case("real", (2, 7, 1, 5), (3, 9), grid(8), **ENDS["clipped"]),
        _case("empty", (0, 6, 3, 5), (6, 10), grid(8), **ENDS["real"]),
    ),
    bytes_moved=_bytes_moved,
    mutations=(
        ("- grid.zero_point\n", "\n"),
        ("whole[:, :, :, left] * (1 - across)", "whole[:, :, :, left]"),
        ("wide[:, :, bottom] * down", "wide[:, :, top] * down"),
        ("* down) * grid.scale", "* down)"),
    ),
)
