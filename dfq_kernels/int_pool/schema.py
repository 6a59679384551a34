"""What every backend of `int_pool` has: arguments, results and their shapes; where windows lie and what they count."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dfq_kernels.integers import EPILOGUE, Epilogue, allocate, unflat
from dfq_kernels.registration import Schema


def out_sides(
    sides: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], ceil_mode: bool,
) -> list[int]:  # fmt: skip
    """Height and width; with `ceil_mode` a last window may begin inside and end outside."""
    found = []
    for side, k, s, p, d in zip(sides, kernel, stride, padding, dilation, strict=True):
        span = side + 2 * p - d * (k - 1) - 1 + (s - 1 if ceil_mode else 0)
        count = span // s + 1
        found.append(count - 1 if ceil_mode and (count - 1) * s >= side + p else count)
    return found


def largest_window(sides: Sequence[int], output_size: Sequence[int]) -> list[int]:
    """Of an adaptive pool."""
    axes = zip(sides, output_size, strict=True)
    return [max(end - begin for begin, end in windows(side, parts)) for side, parts in axes]


def windows_meet(
    sides: Sequence[int], counts: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int],
) -> bool:  # fmt: skip
    """Whether every window sees a place of the map."""
    for side, count, k, s, p, d in zip(sides, counts, kernel, stride, padding, dilation, strict=True):
        for begin in range(-p, count * s - p, s):
            first = -(begin // d) if begin < 0 else 0  # the first tap that is not above or left of the map
            if first >= k or begin + first * d >= side:
                return False
    return True


def out_shape(
    x: Tensor, bits: int, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], ceil_mode: bool, output_size: Sequence[int],
) -> list[int]:  # fmt: skip
    """`[N, C, OH, OW]`; output_size: of an adaptive pool, else empty."""
    sides = list(output_size) or out_sides(x.shape[2:], kernel, stride, padding, dilation, ceil_mode)
    return [x.shape[0], x.shape[1] * 8 // bits, *sides]


def spans(
    sides: Sequence[int], counts: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    output_size: Sequence[int],
) -> list[list[tuple[int, int]]]:  # fmt: skip
    """Where an average's `counts` windows begin and end inside the map, along both axes."""
    if output_size:
        return [windows(side, parts) for side, parts in zip(sides, output_size, strict=True)]
    axes = zip(sides, counts, kernel, stride, padding, strict=True)
    return [
        [(max(begin, 0), min(begin + k, side)) for begin in range(-p, count * s - p, s)]
        for side, count, k, s, p in axes
    ]


def windows(size: int, parts: int) -> list[tuple[int, int]]:
    """Where the windows of an adaptive pool begin and end along an axis; they may be more than there are places."""
    return [(index * size // parts, -(-(index + 1) * size // parts)) for index in range(parts)]


def multipliers(
    scale: float, sides: Sequence[int], counts: Sequence[int], kernel: Sequence[int], stride: Sequence[int],
    padding: Sequence[int], output_size: Sequence[int], count_include_pad: bool, divisor: int,
) -> Tensor:  # fmt: skip
    """What an average's sums are multiplied with: `scale / count`, fp32 `[OH, OW]`.

    count: `divisor`, where it is not 0; else the places of a window that lie in the padded map, or in the map.
    """
    if divisor:
        number = torch.full(tuple(counts), float(divisor))
    elif count_include_pad and not output_size:
        axes = zip(sides, counts, kernel, stride, padding, strict=True)
        rows, columns = (
            [min(begin + k, side + p) - begin for begin in range(-p, count * s - p, s)] for side, count, k, s, p in axes
        )
        number = torch.tensor(rows)[:, None] * torch.tensor(columns)
    else:
        inside = spans(sides, counts, kernel, stride, padding, output_size)
        rows, columns = ([end - begin for begin, end in axis] for axis in inside)
        number = torch.tensor(rows)[:, None] * torch.tensor(columns)
    return torch.tensor(scale, dtype=torch.float32) / number.float()


def _forward(
    x: Tensor, x_grid: list[float], mode: str, kernel: list[int], stride: list[int], padding: list[int],
    dilation: list[int], ceil_mode: bool, output_size: list[int], count_include_pad: bool, divisor: int, *epilogue: Any,
) -> list[Tensor]:  # fmt: skip
    shape = out_shape(x, unflat(x_grid)[1], kernel, stride, padding, dilation, ceil_mode, output_size)
    return allocate(x, shape, Epilogue.of(*epilogue))


FORWARD = Schema(
    "int_pool",
    "(Tensor x, float[] x_grid, str mode, int[] kernel_size, int[] stride, int[] padding, int[] dilation, "
    f"bool ceil_mode, int[] output_size, bool count_include_pad, int divisor, {EPILOGUE}) -> Tensor[]",
    _forward,
)
