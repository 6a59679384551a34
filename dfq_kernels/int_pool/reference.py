"""Pooling of integers in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dfq_kernels.int_pool.schema import windows
from dfq_kernels.integers import Epilogue, allocate, pack_channels, unflat, unpack_channels
from dfq_kernels.quantize import reference as quantize


def forward(
    x: Tensor, x_grid: list[float], mode: str, kernel: list[int], stride: list[int], padding: list[int],
    dilation: list[int], ceil_mode: bool, output_size: list[int], *epilogue: object,
) -> list[Tensor]:  # fmt: skip
    """Average: `t = float(sum of (q - zero_point)) * (scale / count)`, and what every operator ends with. Max: q."""
    grid, bits = unflat(x_grid)
    q, end = unpack_channels(x, bits, grid.signed), Epilogue.of(*epilogue)  # type: ignore[arg-type]
    if mode == "max":
        largest = F.max_pool2d(q.double(), kernel, stride, padding, dilation, ceil_mode)
        result = allocate(x, largest.shape, end)[0]
        return [result.copy_(pack_channels(largest.to(q.dtype), bits))]
    whole, scale = q.double() - grid.zero_point, torch.tensor(grid.scale, device=x.device)
    if not output_size:
        count = float(kernel[0] * kernel[1])  # a tensor below: a GPU multiplies by the reciprocal of a number
        total = F.avg_pool2d(whole, kernel, stride, padding) * count  # a padded place counts and adds nothing
        return quantize.finish(total.round().float() * (scale / torch.full_like(scale, count)), end)
    rows, columns = (windows(size, parts) for size, parts in zip(x.shape[2:], output_size, strict=True))
    sums = [torch.stack([whole[:, :, top:bottom, left:right].sum((2, 3)) for left, right in columns], 2)
            for top, bottom in rows]  # fmt: skip
    counts = [[float((bottom - top) * (right - left)) for left, right in columns] for top, bottom in rows]
    return quantize.finish(torch.stack(sums, 2).float() * (scale / torch.tensor(counts, device=x.device)), end)
