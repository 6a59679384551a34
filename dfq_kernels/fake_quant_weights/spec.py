"""Cases of `fake_quant_weights`: several layers, bits and shapes; a dead channel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dfq_kernels.fake_quant_weights.api import fake_quant_weights
from dfq_kernels.specs import Case, OpSpec, nbytes, randn

Arguments = tuple[dict[str, Any], dict[str, Any]]
SHAPES = ((16, 3, 3, 3), (32, 16, 1, 1), (7, 1, 5, 5), (10, 64))


def _call(bits: Any, dtype: Any = None, backend: str | None = None, **weights: Tensor) -> Any:
    outs, scales = fake_quant_weights(list(weights.values()), bits, dtype=dtype, backend=backend)
    return (*outs, *scales)


def _random(dtype: torch.dtype, bits: Any, made: torch.dtype | None = None) -> Any:
    def make(generator: torch.Generator) -> Arguments:
        weights = {f"weight{i}": randn(generator, *shape, dtype=dtype) for i, shape in enumerate(SHAPES)}
        return _to((weights, {"bits": bits}), made)

    return make


def _to(arguments: Arguments, dtype: torch.dtype | None) -> Arguments:
    """The same with results of another type."""
    return arguments[0], arguments[1] if dtype is None else {**arguments[1], "dtype": dtype}


def _bytes_out(tensors: dict[str, Tensor], keywords: dict[str, Any]) -> int:
    dtype = keywords.get("dtype")
    return sum(value.numel() * (dtype or value.dtype).itemsize for value in tensors.values())


def _two_types(generator: torch.Generator) -> Arguments:
    weights, keywords = _random(torch.float32, [8, 4, 3, 2])(generator)
    return {**weights, "weight1": weights["weight1"].bfloat16()}, keywords


def _many(generator: torch.Generator) -> Arguments:
    """More than one launch takes: rows of 1 to 99."""
    return {f"weight{size}": randn(generator, 1 + size % 2, size) for size in range(1, 100)}, {"bits": 4}


def _dead_channel(generator: torch.Generator) -> Arguments:
    weight = randn(generator, 4, 3, 3, 3)
    weight[1] = 0
    return {"weight0": weight}, {"bits": 4}


def _ties(_: torch.Generator) -> Arguments:
    """Halves of the scale: 7 levels of 0.25 and what lies between them."""
    return {"weight0": torch.arange(-14, 15)[None] / 8}, {"bits": 4}


SPEC = OpSpec(
    op="fake_quant_weights",
    call=_call,
    differentiable=tuple(f"weight{index}" for index in range(len(SHAPES))),
    cases=(
        Case("mixed_bits", _random(torch.float32, [8, 4, 3, 2])),
        *(Case(f"bits{bits}", _random(torch.float32, bits)) for bits in (2, 5, 8)),
        Case("bf16", _random(torch.bfloat16, 4)),
        Case("fp16", _random(torch.float16, 4)),
        Case("two_types", _two_types),
        *(
            Case(f"{given}_to_{made}".replace("torch.", ""), _random(given, [8, 4, 3, 2], made))
            for given, made in (
                (torch.float32, torch.bfloat16),
                (torch.float16, torch.bfloat16),
                (torch.bfloat16, torch.float32),
            )
        ),
        Case("two_types_to_fp16", lambda generator: _to(_two_types(generator), torch.float16)),
        Case("many_layers", _many),
        Case("dead_channel", _dead_channel),
        Case("ties", _ties),
        Case("transposed", lambda generator: ({"weight0": randn(generator, 5, 7).t()}, {"bits": 4})),
    ),
    bytes_moved=lambda tensors, keywords: (nbytes(*tensors.values()) + _bytes_out(tensors, keywords), 0),
    mutations=(
        ("2 ** (count - 1) - 1", "2 ** (count - 1)"),
        (".flatten(1).abs().amax(1)", ".flatten(1).amax(1)"),
        (".clamp(min=SCALE_FLOOR)", ""),
        ("-quant_max, quant_max, 0)", "0, quant_max, 0)"),
    ),
)
