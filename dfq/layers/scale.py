"""Arithmetic with constants, one number or one for each channel: `t = (x - 0) * mult[c] + bias[c]`, a rescale step."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dfq.engine import graph
from dfq.layers.integers import Integers
from dfq.layers.kind import Kind, Layer, register
from dfq.layers.tail import Tail
from dfq.network.calls import Call


@register
class Scale(Kind):
    """`x * constant` or `x + constant`. A constant that is made of the model's parameters (`gamma.view(1, -1, 1, 1)`,
    `1 / c`) is a parameter of the student."""

    name = "scale"
    calls = ("aten.mul.Tensor", "aten.add.Tensor")

    def why_float(self, call: Call) -> str | None:
        constant = _constant(call)
        if constant is None or len(call.operands) != 1:
            return "it is of two values that depend on the images"
        shape = list(constant.shape)
        axes = len(call.shape)
        channels = [1] * (axes + 1 - len(shape)) + shape
        if len(channels) != axes + 1 or any(side != 1 for place, side in enumerate(channels) if place != 1):
            return "its constant is not one number, or one for each channel"
        if not bool(constant.float().abs().max() <= 2.0**64):
            return "its constant is not finite"
        return None

    def never_negative(self, call: Call, operands: list[bool]) -> bool:
        constant = _constant(call)
        assert constant is not None
        return operands[0] and not isinstance(constant, nn.Parameter) and bool((constant >= 0).all())

    def layer(self, call: Call, tail: Tail) -> Layer:
        constant = _constant(call)
        assert constant is not None
        return QuantScale(constant, call.target == "aten.mul.Tensor", tail)


def _constant(call: Call) -> Tensor | None:
    given = call.arguments()
    found = [call.constant(given[key]) for key in ("self", "other")]
    return next((value for value in found if value is not None), None)


class QuantScale(Layer):
    """`x * constant` or `x + constant` and what follows."""

    def __init__(self, constant: Tensor, multiplies: bool, tail: Tail) -> None:
        super().__init__(tail)
        self.multiplies = multiplies
        if isinstance(constant, nn.Parameter):
            self.constant = constant
        else:
            self.register_buffer("constant", constant.detach().float().clone())

    def compute(self, *pairs: Tensor | None) -> Tensor:
        x = pairs[0]
        assert x is not None
        return x * self.constant if self.multiplies else x + self.constant

    def export(self, to: Integers) -> None:
        values = self.constant.detach().float().flatten().expand(to.shape[0]).contiguous()
        ones, zeros = torch.ones_like(values), torch.zeros_like(values)
        mult, bias = (values, zeros) if self.multiplies else (ones, values)
        to.step(graph.Rescale(to.value(0), (), None, zeros, mult, bias))
