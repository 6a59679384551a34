"""Cases of `quantize`: ties, both ends of every grid, storage, strides."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dfq_kernels.integer_cases import Arguments, as_tensors, bytes_moved, grid
from dfq_kernels.quantize.api import quantize
from dfq_kernels.specs import Case, OpSpec, layout_cases, randn


def _call(x: Tensor, backend: str | None = None, **keywords: Any) -> Tensor:
    (on,) = keywords.pop("outs")
    return as_tensors(quantize(x, on, backend=backend, **keywords))


def _case(name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, **keywords: Any) -> Case:
    return Case(name, lambda generator: ({"x": randn(generator, *shape, dtype=dtype, scale=4.0)}, dict(keywords)))


def _values(generator: torch.Generator) -> Arguments:
    """Halves, which tie, and what has no integer near it."""
    ends = torch.tensor([float("inf"), float("-inf"), 3e38, -3e38, 1e-40, 0.0, -0.0])
    return {"x": torch.cat([torch.arange(-20, 21) / 8, ends])[None]}, {"outs": (grid(4, True, 0, 0.25),)}


SPEC = OpSpec(
    op="quantize",
    call=_call,
    differentiable=(),
    cases=(
        Case("ties", _values),
        _case("u8", (2, 5, 7, 3), outs=(grid(8),)),
        _case("s8", (3, 33), outs=(grid(8, True, 127),), activation="relu"),
        _case("u4_packed", (2, 6, 5, 5), outs=(grid(4),), packed=True, activation="relu6"),
        _case("s2_packed", (2, 136, 3, 3), outs=(grid(2, True),), packed=True),
        _case("odd_channels_stay_bytes", (2, 5, 3, 3), outs=(grid(2),), packed=True),
        _case("hardtanh", (2, 5, 7, 3), outs=(grid(8, True),), activation="hardtanh(-1.5,2.25)"),
        _case("leaky", (2, 5, 7, 3), outs=(grid(8, True, 3),), activation="leaky_relu(0.1)"),
        _case("hardsigmoid", (2, 5, 7, 3), outs=(grid(8, scale=0.00390625),), activation="hardsigmoid"),
        _case("hardswish_packed", (2, 8, 5, 5), outs=(grid(4, scale=0.25),), packed=True, activation="hardswish"),
        _case("bf16", (2, 3, 9, 9), torch.bfloat16, outs=(grid(8),)),
        _case("fp16", (2, 3, 9, 9), torch.float16, outs=(grid(8),)),
        *layout_cases(lambda x: ({"x": x}, {"outs": (grid(8, scale=0.03125),)})),
        _case("empty", (0, 3, 4, 4), outs=(grid(8),)),
    ),
    bytes_moved=lambda tensors, keywords: bytes_moved(
        tensors, keywords, tensors["x"].numel() // tensors["x"].shape[1], tensors["x"].shape[1]
    ),
    mutations=(
        (".round()", ".add(0.5).floor()"),
        ("t * grid.inverse + grid.zero_point).round()", "t * grid.inverse).round().add(grid.zero_point)"),
        ("t * grid.inverse", "t / grid.scale"),
        ("t.clamp(*known.bounds)", "t.relu()"),
        ("torch.where(t > 0, t, t * known.a)", "torch.where(t > 0, t, known.a - t)"),
        ("clamp(0, 6) * SIXTH", "clamp(0, 6) / 6"),
        ("else t * gate", "else gate"),
        ("activate(t, epilogue.activation)", "t"),
    ),
)
