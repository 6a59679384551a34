"""Averages and sums over windows, over the map, over any axes: an integer sum and one multiplication.

t = float(sum over the window of (q - zero_point)) * (scale / count)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dfq.engine import graph
from dfq.layers.integers import Integers
from dfq.layers.kind import Kind, Layer, integers_of, register, sides
from dfq.layers.tail import Tail
from dfq.network.calls import Call

_ADAPTIVE = ("aten.adaptive_avg_pool1d.default", "aten.adaptive_avg_pool2d.default")
_REDUCTIONS = ("aten.mean.dim", "aten.sum.dim_IntList")


@register
class AveragePool(Kind):
    """The average of each window, of a kernel or of an adaptive pool: `t = float(sum of (x - z)) * (s / count)`."""

    name = "average pool"
    calls = ("aten.avg_pool1d.default", "aten.avg_pool2d.default", *_ADAPTIVE)

    def never_negative(self, call: Call, operands: list[bool]) -> bool:
        return operands[0]

    def layer(self, call: Call, tail: Tail) -> Layer:
        given = call.arguments()
        flat = call.target.startswith(("aten.avg_pool1d", "aten.adaptive_avg_pool1d"))
        axes = 1 if flat else 2
        if call.target in _ADAPTIVE:
            return QuantAveragePool(tail, flat, output=sides(given["output_size"], axes, 1))
        kernel = sides(given["kernel_size"], axes, 1)
        return QuantAveragePool(
            tail, flat, kernel=kernel, stride=sides(given["stride"] or given["kernel_size"], axes, 1),
            padding=sides(given["padding"], axes, 0), ceil_mode=bool(given["ceil_mode"]),
            count_include_pad=bool(given["count_include_pad"]), divisor=int(given.get("divisor_override") or 0),
        )  # fmt: skip


class QuantAveragePool(Layer):
    """Average of windows: output of an adaptive pool, or kernel, stride and what they go with."""

    averages = True

    def __init__(
        self, tail: Tail, flat: bool, *, output: tuple[int, int] | None = None, kernel: tuple[int, int] | None = None,
        stride: tuple[int, int] = (1, 1), padding: tuple[int, int] = (0, 0), ceil_mode: bool = False,
        count_include_pad: bool = True, divisor: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(tail)
        self.flat, self.output, self.kernel, self.stride, self.padding = flat, output, kernel, stride, padding
        self.ceil_mode, self.count_include_pad, self.divisor = ceil_mode, count_include_pad, divisor

    def compute(self, *pairs: Tensor | None) -> Tensor:
        return self._on_maps(pairs, lambda x, _: self._pool(x, self.divisor, self.count_include_pad))

    def exact(self, *pairs: Tensor | None) -> Tensor:
        return self.compute(*pairs) if pairs[1] is None else self._on_maps(pairs, self._exact)

    def _on_maps(self, pairs: Any, pool: Callable[[Tensor, Any], Tensor]) -> Tensor:
        x, scale = pairs
        out = pool(x.unsqueeze(-2) if self.flat else x, scale)
        return out.squeeze(-2) if self.flat else out

    def _pool(self, x: Tensor, divisor: int, count_include_pad: bool) -> Tensor:
        if self.kernel is None:
            assert self.output is not None
            return F.adaptive_avg_pool2d(x, self.output)
        return F.avg_pool2d(
            x, self.kernel, self.stride, self.padding, self.ceil_mode, count_include_pad, divisor or None
        )

    def _exact(self, x: Tensor, scale: Tensor) -> Tensor:
        integers, count = integers_of(x, scale).double(), self._count(x)
        total = self._pool(integers, 1, True) if self.kernel is not None else self._pool(integers, 0, True) * count
        return torch.round(total).float() * (scale / count.float())

    def _count(self, x: Tensor) -> Tensor:
        """By what each window's sum is divided, float64, to broadcast over `[N, C, H, W]`."""
        if self.divisor:
            return torch.tensor(float(self.divisor), dtype=torch.float64, device=x.device)
        if self.kernel is not None:
            ones = torch.ones(1, 1, *x.shape[2:], dtype=torch.float64, device=x.device)
            if not self.count_include_pad:
                return self._pool(ones, 1, True).round()
            sizes = [_counted(*axis, self.ceil_mode, x.device) for axis in
                     zip(x.shape[2:], self.kernel, self.stride, self.padding, strict=True)]  # fmt: skip
            return sizes[0][:, None] * sizes[1][None, :]
        assert self.output is not None
        sizes = []
        for size, parts in zip(x.shape[2:], self.output, strict=True):
            index = torch.arange(parts, device=x.device)
            sizes.append((((index + 1) * size + parts - 1) // parts - index * size // parts).double())
        return sizes[0][:, None] * sizes[1][None, :]

    def export(self, to: Integers) -> None:
        x = to.value(0, (lambda x: x.unsqueeze(-2)) if self.flat else None)
        if self.kernel is None:
            assert self.output is not None
            to.step(graph.AveragePool(x, (), None, output=self.output))
            return
        to.step(graph.AveragePool(
            x, (), None, self.kernel, self.stride, self.padding, ceil_mode=self.ceil_mode,
            count_include_pad=self.count_include_pad, divisor=self.divisor,
        ))  # fmt: skip


def _counted(size: int, kernel: int, stride: int, padding: int, ceil_mode: bool, device: torch.device) -> Tensor:
    """Places of each window in the padded map, along one axis."""
    line = torch.ones(1, 1, 1, size, dtype=torch.float64)
    windows = F.avg_pool2d(line, (1, kernel), (1, stride), (0, padding), ceil_mode).shape[-1]
    begins = torch.arange(windows, device=device) * stride - padding
    return (torch.clamp(begins + kernel, max=size + padding) - begins).double()


@register
class Reduction(Kind):
    """A mean or a sum over some axes: of one row of pixels, with what is left as channels."""

    name = "mean"
    calls = _REDUCTIONS

    def why_float(self, call: Call) -> str | None:
        given, axes = call.arguments(), len(call.operands[0].meta["val"].shape)
        dims = _dims(given["dim"], axes)
        if given.get("dtype") is not None:
            return "it changes the type of its values"
        return "it is over the images" if 0 in dims or not dims else None

    def never_negative(self, call: Call, operands: list[bool]) -> bool:
        return operands[0]

    def layer(self, call: Call, tail: Tail) -> Layer:
        given = call.arguments()
        dims = _dims(given["dim"], len(call.operands[0].meta["val"].shape))
        return QuantReduction(dims, bool(given["keepdim"]), call.target == "aten.mean.dim", tail)


def _dims(dim: Any, axes: int) -> list[int]:
    if dim is None:
        return []
    return sorted(int(item) % axes for item in ([dim] if isinstance(dim, int) else dim))


class QuantReduction(Layer):
    """`t = float(sum over dims of (x - z)) * s`; of a mean `s / count` in place of `s`."""

    def __init__(self, dims: list[int], keepdim: bool, mean: bool, tail: Tail) -> None:
        super().__init__(tail)
        self.dims, self.keepdim, self.mean = dims, keepdim, mean
        self.averages = mean

    def compute(self, *pairs: Tensor | None) -> Tensor:
        x = pairs[0]
        assert x is not None
        return x.mean(self.dims, self.keepdim) if self.mean else x.sum(self.dims, self.keepdim)

    def exact(self, *pairs: Tensor | None) -> Tensor:
        x, scale = pairs
        assert x is not None
        if scale is None:
            return self.compute(x, scale)
        total = integers_of(x, scale).sum(self.dims, self.keepdim, dtype=torch.float64)
        count = 1
        for dim in self.dims:
            count *= x.shape[dim]
        divided = scale / torch.full_like(scale, float(count)) if self.mean else scale
        return total.float() * divided

    def export(self, to: Integers) -> None:
        shape = to.operand_shape(0)
        if self.dims == [2, 3] and len(shape) == 3:
            self._over(to, to.value(0), shape[1:], shape[0])
            return
        kept = [dim for dim in range(1, len(shape) + 1) if dim not in self.dims]
        left, gone = _product([shape[dim - 1] for dim in kept]), _product([shape[dim - 1] for dim in self.dims])
        x = to.value(0, lambda x: x.permute(0, *kept, *self.dims).reshape(1, left, gone))
        self._over(to, x, (1, gone), left)

    def _over(self, to: Integers, x: str, places: tuple[int, ...], channels: int) -> None:
        window = places[0], places[1]
        to.step(graph.AveragePool(x, (), None, window, window, divisor=0 if self.mean else 1), (channels, 1, 1))


def _product(sides: list[int]) -> int:
    total = 1
    for side in sides:
        total *= side
    return total
