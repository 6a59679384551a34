"""`int_resize` in C++: csrc/cpu/program.cpp."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dfq_kernels.int_resize import schema
from dfq_kernels.integers import Epilogue, unflat, unpack_channels
from dfq_kernels.programs import RESIZE, OneStep, set_resize
from dfq_kernels.registration import register


@register(schema.FORWARD, "native")
def forward(
    x: Tensor, x_grid: list[float], rows: Tensor, row_weights: Tensor, columns: Tensor, column_weights: Tensor,
    *epilogue: Any,
) -> list[Tensor]:  # fmt: skip
    """Along rows, then along columns, then times the scale, and what every operator ends with."""
    grid, bits = unflat(x_grid)
    inputs = [(unpack_channels(x, bits, grid.signed), grid)]

    def fill(step: Any) -> None:
        set_resize(step, rows, row_weights, columns, column_weights, grid.scale)

    shape = schema.out_shape(x, bits, rows, columns)
    return OneStep(RESIZE, shape, Epilogue.of(*epilogue), inputs, fill=fill).run(x)
