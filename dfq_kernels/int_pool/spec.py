"""Cases of `int_pool`: windows at the edge, of every kind, in every storage."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dfq_kernels.int_pool.api import int_pool
from dfq_kernels.int_pool.schema import out_shape
from dfq_kernels.integer_cases import ENDS, Arguments, as_tensors, bytes_moved, grid, integers
from dfq_kernels.integers import Grid, QuantizedTensor, one_or_two
from dfq_kernels.specs import Case, OpSpec


def _call(x: Tensor, bits: int, on: Grid, backend: str | None = None, **keywords: Any) -> Any:
    return as_tensors(int_pool(QuantizedTensor(x, on, bits), backend=backend, **keywords))


def _case(name: str, shape: tuple[int, int, int, int], on: Grid, *, packed_x: bool = False, **keywords: Any) -> Case:
    def make(generator: torch.Generator) -> Arguments:
        x = integers(generator, shape, on, packed_x)
        return {"x": x["q"]}, {"bits": x["bits"], "on": on, **keywords}

    return Case(name, make)


def _wider(generator: torch.Generator) -> Arguments:
    """Integers of 2 bits in 4."""
    x = torch.randint(0, 256, (2, 4, 6, 6), generator=generator).to(torch.uint8) & 0x33
    return {"x": x}, {"bits": 4, "on": grid(2), "mode": "max", "kernel_size": 2}


def _bytes_moved(tensors: dict[str, Any], keywords: dict[str, Any]) -> tuple[int, int]:
    sides = one_or_two(keywords["output_size"]) if "output_size" in keywords else []
    kernel = one_or_two(keywords.get("kernel_size", 1))
    padding, dilation = one_or_two(keywords.get("padding", 0)), one_or_two(keywords.get("dilation", 1))
    stride, ceil_mode = one_or_two(keywords.get("stride", kernel)), keywords.get("ceil_mode", False)
    shape = out_shape(tensors["x"], keywords["bits"], kernel, stride, padding, dilation, ceil_mode, sides)
    outs = keywords.get("outs") or ((keywords["on"],) if keywords.get("mode") == "max" else ())
    ends = {**keywords, "outs": outs, "packed": keywords["bits"] < 8 or keywords.get("packed", False)}
    return bytes_moved(tensors, ends, shape[0] * shape[2] * shape[3], shape[1])


SPEC = OpSpec(
    op="int_pool",
    call=_call,
    differentiable=(),
    cases=(
        _case("global", (3, 10, 7, 5), grid(8), output_size=1, **ENDS["one"]),
        _case("adaptive", (2, 12, 7, 5), grid(4, True), packed_x=True, output_size=(3, 4), **ENDS["packed"]),
        _case("average", (2, 5, 7, 6), grid(8, True), kernel_size=3, stride=2, padding=1, **ENDS["real"]),
        _case("average_packed", (2, 8, 7, 6), grid(2), packed_x=True, kernel_size=(2, 3), **ENDS["packed"]),
        _case("max", (2, 5, 7, 6), grid(8, True), mode="max", kernel_size=3, stride=2, padding=1),
        _case("max_packed", (2, 12, 9, 6), grid(4, True), packed_x=True, mode="max", kernel_size=2, dilation=2),
        Case("max_wider_than_its_grid", _wider),
        _case("max_ceil", (1, 6, 8, 7), grid(4), mode="max", kernel_size=2, stride=2, ceil_mode=True),
        _case(
            "average_ceil",
            (2, 5, 8, 7),
            grid(8, True),
            kernel_size=3,
            stride=2,
            padding=1,
            ceil_mode=True,
            **ENDS["gated"],
        ),
        _case(
            "uncounted",
            (2, 8, 8, 7),
            grid(4),
            packed_x=True,
            kernel_size=(3, 2),
            stride=2,
            padding=1,
            ceil_mode=True,
            count_include_pad=False,
            **ENDS["leaky"],
        ),
        _case("divisor", (2, 5, 7, 6), grid(8), kernel_size=2, stride=1, divisor_override=3, **ENDS["clipped"]),
        _case("adaptive_to_more", (2, 5, 3, 2), grid(8), output_size=(7, 3), **ENDS["one"]),
        _case("adaptive_max", (2, 12, 7, 5), grid(4, True), packed_x=True, mode="max", output_size=(3, 7)),
        _case("empty", (0, 6, 8, 7), grid(8), output_size=1, **ENDS["one"]),
    ),
    bytes_moved=_bytes_moved,
    mutations=(
        ("q.double() - grid.zero_point", "q.double()"),
        (".float() * mult, end", ".float() * mult * mult, end"),
        ("before[:, :, bottom] - before[:, :, top]", "before[:, :, bottom]"),
        ("padding, dilation, ceil_mode), bits", "padding, dilation, False), bits"),
        ("elif count_include_pad and not output_size", "elif not output_size"),
        ("min(begin + k, side + p) - begin", "k"),
        ("if divisor:", "if False:"),
        ("scale, dtype=torch.float32) / number.float()", "scale, dtype=torch.float64) / number.double()"),
    ),
)
