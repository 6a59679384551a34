"""`requantize` in C++: csrc/cpu/program.cpp."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dfq_kernels.integers import Epilogue, unflat, unpack_channels
from dfq_kernels.programs import ADD, RESCALE, OneStep, set_norm
from dfq_kernels.registration import register
from dfq_kernels.requantize import schema


@register(schema.FORWARD, "native")
def forward(
    x: Tensor, x_grid: list[float], norm: Sequence[Tensor], other: Tensor | None, other_grid: list[float],
    activation: str | None, outs: list[float], then: Sequence[Tensor], then_activation: str | None,
    then_outs: list[float],
) -> list[Tensor]:  # fmt: skip
    """What x stands for, normalised, plus what `other` stands for."""
    grid, bits = unflat(x_grid)
    inputs = [(unpack_channels(x, bits, grid.signed), grid)]
    if other is not None:
        others, width = unflat(other_grid)
        inputs.append((unpack_channels(other, width, others.signed), others))

    def fill(step: Any) -> None:
        set_norm(step, norm)

    epilogue = Epilogue.of(activation, outs, then, then_activation, then_outs)
    step = OneStep(RESCALE if other is None else ADD, inputs[0][0].shape, epilogue, inputs, fill=fill)
    return step.run(x)
