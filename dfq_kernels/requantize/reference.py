"""Integers to other grids, or to real numbers, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dfq_kernels.integers import Epilogue, unflat, unpack_channels
from dfq_kernels.quantize import reference as quantize


def forward(
    x: Tensor, x_grid: list[float], norm: Sequence[Tensor], other: Tensor | None, other_grid: list[float],
    *epilogue: object,
) -> list[Tensor]:  # fmt: skip
    """What x stands for, normalised, plus what `other` stands for."""
    t = quantize.normalized(_real(x, x_grid), *norm)
    if other is not None:
        t = t + _real(other, other_grid)
    return quantize.finish(t, Epilogue.of(*epilogue))  # type: ignore[arg-type]


def _real(q: Tensor, numbers: list[float]) -> Tensor:
    grid, bits = unflat(numbers)
    return quantize.real(unpack_channels(q, bits, grid.signed), grid)
