"""What every backend of `int_conv2d` has: arguments, results and their shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dfq_kernels.integers import EPILOGUE, Epilogue, allocate
from dfq_kernels.registration import Schema


def out_shape(
    x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> tuple[int, int, int, int]:
    """`[N, O, OH, OW]`."""
    sides = zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    height, width = ((side + 2 * p - d * (k - 1) - 1) // s + 1 for side, k, s, p, d in sides)
    return x.shape[0], weight.shape[0], height, width


def _forward(
    x: Tensor, x_grid: list[float], weight: Tensor, sums: Tensor, weight_bits: int, mult: Tensor, bias: Tensor,
    stride: list[int], padding: list[int], dilation: list[int], groups: int, residual: Any, residual_grid: Any,
    *epilogue: Any,
) -> list[Tensor]:  # fmt: skip
    return allocate(x, out_shape(x, weight, stride, padding, dilation), Epilogue.of(*epilogue))


FORWARD = Schema(
    "int_conv2d",
    "(Tensor x, float[] x_grid, Tensor weight, Tensor sums, int weight_bits, Tensor mult, Tensor bias, int[] stride, "
    f"int[] padding, int[] dilation, int groups, Tensor? residual, float[] residual_grid, {EPILOGUE}) -> Tensor[]",
    _forward,
)
