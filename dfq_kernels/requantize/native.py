"""`requantize` in C++: csrc/cpu/program.cpp."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dfq_kernels.integers import Constants, Epilogue, unflat, unpack_channels
from dfq_kernels.programs import ADD, MULTIPLY, RESCALE, TABLE, OneStep, set_constants
from dfq_kernels.registration import register
from dfq_kernels.requantize import schema


@register(schema.FORWARD, "native")
def forward(
    x: Tensor, x_grid: list[float], constants: Sequence[Tensor | None], other: Tensor | None, other_grid: list[float],
    product_scale: float | None, *epilogue: Any,
) -> list[Tensor]:  # fmt: skip
    """What x stands for, plus or times what `other` stands for."""
    grid, bits = unflat(x_grid)
    inputs, given = [(unpack_channels(x, bits, grid.signed), grid)], Constants(*constants)
    kind = RESCALE if given.table is None else TABLE
    if other is not None:
        others, width = unflat(other_grid)
        inputs.append((unpack_channels(other, width, others.signed), others))
        kind = ADD if product_scale is None else MULTIPLY

    def fill(step: Any) -> None:
        set_constants(step, given, grid)
        if product_scale is not None:
            step.scale = product_scale

    return OneStep(kind, inputs[0][0].shape, Epilogue.of(*epilogue), inputs, fill=fill).run(x)
