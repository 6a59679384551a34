"""Bilinear and linear resizing: of every pixel four neighbours, in fp32, each operation rounded on its own.

h(y) = a[y, left] * (1 - lx) + a[y, right] * lx,    t = (h(top) * (1 - ly) + h(bottom) * ly) * scale
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dfq.engine import graph
from dfq.layers.integers import Integers
from dfq.layers.kind import Kind, Layer, integers_of, register
from dfq.layers.tail import Tail
from dfq.network.calls import Call, shape_of


@register
class Resize(Kind):
    """Linear and bilinear resizing to a size or by factors, with corners aligned or not."""

    name = "resize"
    calls = ("aten.upsample_linear1d.vec", "aten.upsample_bilinear2d.vec")

    def never_negative(self, call: Call, operands: list[bool]) -> bool:
        return operands[0]

    def layer(self, call: Call, tail: Tail) -> Layer:
        given, before, after = call.arguments(), shape_of(call.operands[0])[1:], call.shape[1:]
        factors = given.get("scale_factors") or [None] * len(after)
        axes = [_axis(*sides, bool(given["align_corners"])) for sides in zip(before, after, factors, strict=True)]
        if len(axes) == 1:
            axes.insert(0, (torch.zeros(2, 1, dtype=torch.int32), torch.zeros(1)))
        return QuantResize(axes, list(after), bool(given["align_corners"]), given.get("scale_factors"), tail)


def _axis(before: int, after: int, factor: float | None, align_corners: bool) -> tuple[Tensor, Tensor]:
    """Both neighbours int32 `[2, after]` and the weight of the second, fp32."""
    index = torch.arange(after, dtype=torch.float64)
    if align_corners:
        place = index * ((before - 1) / (after - 1) if after > 1 else 0.0)
    else:
        place = ((index + 0.5) * (1 / factor if factor else before / after) - 0.5).clamp(min=0)
    first = place.floor().clamp(max=before - 1)
    both = torch.stack([first, (first + 1).clamp(max=before - 1)]).to(torch.int32)
    return both, (place - first).clamp(0, 1).float()


class QuantResize(Layer):
    """In training torch's resizing; exact: `h` and `t` on integers, from places and weights that are computed once.

    rows, columns: int32 `[2, OH]` and `[2, OW]`, both neighbours; row_weights, column_weights: fp32, of the second.
    """

    rows: Tensor
    row_weights: Tensor
    columns: Tensor
    column_weights: Tensor

    def __init__(
        self, axes: list[tuple[Tensor, Tensor]], size: list[int], align: bool, factors: Any, tail: Tail
    ) -> None:
        super().__init__(tail)
        (rows, row_weights), (columns, column_weights) = axes
        self.size, self.align_corners, self.factors = size, align, factors
        for name, value in (("rows", rows), ("row_weights", row_weights), ("columns", columns),
                            ("column_weights", column_weights)):  # fmt: skip
            self.register_buffer(name, value, persistent=False)

    def compute(self, *pairs: Tensor | None) -> Tensor:
        x, factors = pairs[0], self.factors
        calls = torch.ops.aten.upsample_linear1d.vec, torch.ops.aten.upsample_bilinear2d.vec
        return calls[len(self.size) - 1](x, None if factors else self.size, self.align_corners, factors)  # type: ignore[no-any-return]

    def exact(self, *pairs: Tensor | None) -> Tensor:
        x, scale = pairs
        if x is None or scale is None:
            return self.compute(*pairs)
        flat = len(self.size) == 1
        a = integers_of(x, scale)
        a = a.unsqueeze(-2) if flat else a
        left, right = (a.index_select(3, side) for side in self.columns)
        across = left * (1 - self.column_weights) + right * self.column_weights
        top, bottom = (across.index_select(2, side) for side in self.rows)
        weights = self.row_weights[:, None]
        t = (top * (1 - weights) + bottom * weights) * scale
        return t.squeeze(-2) if flat else t

    def export(self, to: Integers) -> None:
        x = to.value(0, (lambda x: x.unsqueeze(-2)) if len(self.size) == 1 else None)
        to.step(graph.Resize(x, (), None, self.rows, self.row_weights, self.columns, self.column_weights))
