"""Bilinear resizing of integers in plain PyTorch."""

from __future__ import annotations

from torch import Tensor

from dfq_kernels.integers import Epilogue, unflat, unpack_channels
from dfq_kernels.quantize import reference as quantize


def forward(
    x: Tensor, x_grid: list[float], rows: Tensor, row_weights: Tensor, columns: Tensor, column_weights: Tensor,
    *epilogue: object,
) -> list[Tensor]:  # fmt: skip
    """Along rows, then along columns, then times the scale, and what every operator ends with."""
    grid, bits = unflat(x_grid)
    whole = unpack_channels(x, bits, grid.signed).float() - grid.zero_point
    (top, bottom), (left, right) = rows.long(), columns.long()
    across, down = column_weights.float(), row_weights.float()[:, None]
    wide = whole[:, :, :, left] * (1 - across) + whole[:, :, :, right] * across
    t = (wide[:, :, top] * (1 - down) + wide[:, :, bottom] * down) * grid.scale
    return quantize.finish(t, Epilogue.of(*epilogue))  # type: ignore[arg-type]
