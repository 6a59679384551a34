"""What every backend of `requantize` has: arguments, results and their shapes."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dfq_kernels.integers import EPILOGUE, Epilogue, allocate, unflat
from dfq_kernels.registration import Schema


def _forward(
    x: Tensor, x_grid: list[float], constants: Any, other: Any, other_grid: Any, product_scale: Any, *epilogue: Any
) -> list[Tensor]:
    shape = (x.shape[0], x.shape[1] * 8 // unflat(x_grid)[1], *x.shape[2:])
    return allocate(x, shape, Epilogue.of(*epilogue))


FORWARD = Schema(
    "requantize",
    "(Tensor x, float[] x_grid, Tensor?[] constants, Tensor? other, float[] other_grid, float? product_scale, "
    f"{EPILOGUE}) -> Tensor[]",
    _forward,
)
