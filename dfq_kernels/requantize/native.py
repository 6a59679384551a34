"""`requantize` in C++: csrc/cpu/program.cpp."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dfq_kernels.integers import Constants, Epilogue, unflat, unpack_channels
from dfq_kernels.programs import ADD, RESCALE, OneStep, set_norm
from dfq_kernels.registration import register
from dfq_kernels.requantize import schema


@register(schema.FORWARD, "native")
def forward(
    x: Tensor, x_grid: list[float], constants: Sequence[Tensor | None], other: Tensor | None, other_grid: list[float],
    product_scale: float | None, *epilogue: Any,
) -> list[Tensor]:  # fmt: skip
    """What x stands for, plus or times what `other` stands for."""
    grid, bits = unflat(x_grid)
    inputs = [(unpack_channels(x, bits, grid.signed), grid)]
    if other is not None:
        others, width = unflat(other_grid)
        inputs.append((unpack_channels(other, width, others.signed), others))

    def fill(step: Any) -> None:
        set_norm(step, Constants(*constants).norm)

    kind = RESCALE if other is None else ADD
    return OneStep(kind, inputs[0][0].shape, Epilogue.of(*epilogue), inputs, fill=fill).run(x)
