"""Pooling of integers in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dfq_kernels.int_pool.schema import multipliers, out_sides, spans
from dfq_kernels.integers import Epilogue, allocate, pack_channels, unflat, unpack_channels
from dfq_kernels.quantize import reference as quantize


def forward(
    x: Tensor, x_grid: list[float], mode: str, kernel: list[int], stride: list[int], padding: list[int],
    dilation: list[int], ceil_mode: bool, output_size: list[int], count_include_pad: bool, divisor: int,
    *epilogue: object,
) -> list[Tensor]:  # fmt: skip
    """Average: `t = float(sum of (q - zero_point)) * (scale / count)`, and what every operator ends with. Max: q."""
    grid, bits = unflat(x_grid)
    q, end = unpack_channels(x, bits, grid.signed), Epilogue.of(*epilogue)  # type: ignore[arg-type]
    if mode == "max" and output_size:
        return _largest(x, q, F.adaptive_max_pool2d(q.double(), output_size), bits, end)
    if mode == "max":
        return _largest(x, q, F.max_pool2d(q.double(), kernel, stride, padding, dilation, ceil_mode), bits, end)
    sides, whole = x.shape[2:], q.double() - grid.zero_point
    counts = output_size or out_sides(sides, kernel, stride, padding, dilation, ceil_mode)
    window = (sides, counts, kernel, stride, padding, output_size)
    mult = multipliers(grid.scale, *window, count_include_pad, divisor).to(x.device)
    return quantize.finish(_sums(whole, spans(*window)).float() * mult, end)


def _largest(x: Tensor, q: Tensor, largest: Tensor, bits: int, end: Epilogue) -> list[Tensor]:
    result = allocate(x, largest.shape, end)[0]
    return [result.copy_(pack_channels(largest.to(q.dtype), bits))]


def _sums(whole: Tensor, inside: list[list[tuple[int, int]]]) -> Tensor:
    """Over windows, from sums over all that is above and left of a place: integers below 2^53, exact in any order."""
    (top, bottom), (left, right) = (torch.tensor(axis, device=whole.device).T for axis in inside)
    before = F.pad(whole.cumsum(2).cumsum(3), (1, 0, 1, 0))
    rows = before[:, :, bottom] - before[:, :, top]
    return rows[:, :, :, right] - rows[:, :, :, left]
