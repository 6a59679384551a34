"""Additions of two values: both on grids, or one of them the sums of the layer in front of it."""

from __future__ import annotations

from torch import Tensor

from dfq.engine import graph
from dfq.layers.integers import Integers
from dfq.layers.kind import Kind, Layer, register
from dfq.layers.tail import Tail
from dfq.network.calls import Call, shape_of


@register
class Add(Kind):
    """`x + y` of two values of one shape, or one of them spread over the other."""

    name = "addition"
    calls = ("aten.add.Tensor",)
    sums = True

    def why_float(self, call: Call) -> str | None:
        return why_not_two(call)

    def never_negative(self, call: Call, operands: list[bool]) -> bool:
        return all(operands)

    def layer(self, call: Call, tail: Tail) -> Layer:
        return QuantAdd(tail)


def why_not_two(call: Call) -> str | None:
    """Why a call is not one of two values of one shape, one of which may be spread over the other."""
    if len(call.operands) != 2:
        return "it is not of two values"
    first, second = (shape_of(item) for item in call.operands)
    if len(first) != len(second):
        return "its values differ in their number of axes"
    return None if call.shape in (first, second) else "each of its values is spread over the other"


class QuantAdd(Layer):
    """`t = x + y`, of real values; where one of them is a layer's sums, its step is that layer's, with a residual."""

    def compute(self, *pairs: Tensor | None) -> Tensor:
        x, _, other, _ = pairs
        assert x is not None and other is not None
        return x + other

    def export(self, to: Integers) -> None:
        to.add(0, 1, lambda x, other: graph.Add(x, (), None, other))
