"""What every backend of `int_resize` has: arguments, results and their shapes."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dfq_kernels.integers import EPILOGUE, Epilogue, allocate, unflat
from dfq_kernels.registration import Schema


def out_shape(x: Tensor, bits: int, rows: Tensor, columns: Tensor) -> list[int]:
    """`[N, C, OH, OW]`."""
    return [x.shape[0], x.shape[1] * 8 // bits, rows.shape[1], columns.shape[1]]


def _forward(
    x: Tensor, x_grid: list[float], rows: Tensor, row_weights: Any, columns: Tensor, column_weights: Any, *epilogue: Any
) -> list[Tensor]:
    return allocate(x, out_shape(x, unflat(x_grid)[1], rows, columns), Epilogue.of(*epilogue))


FORWARD = Schema(
    "int_resize",
    "(Tensor x, float[] x_grid, Tensor rows, Tensor row_weights, Tensor columns, Tensor column_weights, "
    f"{EPILOGUE}) -> Tensor[]",
    _forward,
)
