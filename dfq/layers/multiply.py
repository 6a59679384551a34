"""Products of two values: gates, squeeze-and-excitation. `t = float((a - z_a) * (b - z_b)) * s`, `s = s_a * s_b`."""

from __future__ import annotations

import torch
from torch import Tensor

from dfq.engine import graph
from dfq.layers.add import why_not_two
from dfq.layers.integers import Integers
from dfq.layers.kind import Kind, Layer, integers_of, register
from dfq.layers.tail import Tail
from dfq.network.calls import Call


@register
class Multiply(Kind):
    """`x * y` of two values of one shape, or one of them spread over the other."""

    name = "multiplication"
    calls = ("aten.mul.Tensor",)

    def why_float(self, call: Call) -> str | None:
        return why_not_two(call)

    def never_negative(self, call: Call, operands: list[bool]) -> bool:
        return all(operands)

    def layer(self, call: Call, tail: Tail) -> Layer:
        return QuantMultiply(tail)


class QuantMultiply(Layer):
    """In training `x * y`; exact: the product of both integers, times the product of both scales."""

    def compute(self, *pairs: Tensor | None) -> Tensor:
        x, _, other, _ = pairs
        assert x is not None and other is not None
        return x * other

    def exact(self, *pairs: Tensor | None) -> Tensor:
        x, x_scale, other, other_scale = pairs
        if x is None or other is None or x_scale is None or other_scale is None:
            return self.compute(*pairs)
        return integers_of(x, x_scale) * integers_of(other, other_scale) * (x_scale * other_scale)

    def export(self, to: Integers) -> None:
        def step(x: str, other: str) -> graph.Multiply:
            scale = torch.tensor(to.grid(x).scale) * torch.tensor(to.grid(other).scale)
            return graph.Multiply(x, (), None, other, float(scale))

        to.add(0, 1, step)
