"""Integers to other grids, or to real numbers, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dfq_kernels.integers import Epilogue, unflat, unpack_channels
from dfq_kernels.quantize import reference as quantize


def forward(
    x: Tensor, x_grid: list[float], constants: Sequence[Tensor | None], other: Tensor | None, other_grid: list[float],
    product_scale: float | None, *epilogue: object,
) -> list[Tensor]:  # fmt: skip
    """What x stands for, plus or times what `other` stands for."""
    grid, bits = unflat(x_grid)
    q = unpack_channels(x, bits, grid.signed)
    if other is None:
        t = quantize.meant(q, grid, constants)
    else:
        others, width = unflat(other_grid)
        r = unpack_channels(other, width, others.signed)
        if product_scale is None:
            t = quantize.meant(q, grid, constants) + quantize.real(r, others)
        else:  # products of two integers of 8 bits are exact in fp32
            t = (q.float() - grid.zero_point) * (r.float() - others.zero_point) * product_scale
    return quantize.finish(t, Epilogue.of(*epilogue))  # type: ignore[arg-type]
