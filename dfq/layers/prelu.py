"""PReLU: `t > 0 ? t : slope[c] * t`, on a stream."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dfq.engine import graph
from dfq.layers.integers import Integers
from dfq.layers.kind import Kind, Layer, per_channel, register
from dfq.layers.tail import Tail
from dfq.network.calls import Call


@register
class PReLU(Kind):
    """`t > 0 ? t : slope[c] * t`, with one slope or one for each channel; the student trains it."""

    name = "prelu"
    calls = ("aten.prelu.default", "aten._prelu_kernel.default")

    def why_float(self, call: Call) -> str | None:
        slope = call.constant(call.arguments()["weight"])
        if slope is None:
            return "its slope depends on the images"
        return None if slope.numel() in (1, call.shape[0]) else "its slopes are not one for each channel"

    def layer(self, call: Call, tail: Tail) -> Layer:
        slope = call.constant(call.arguments()["weight"])
        assert slope is not None
        return QuantPReLU(slope if isinstance(slope, nn.Parameter) else nn.Parameter(slope.clone()), tail)


class QuantPReLU(Layer):
    """`t = (x - z) * s`, then `t > 0 ? t : slope[c] * t`; a slope that is a parameter of the model stays that one."""

    def __init__(self, slope: nn.Parameter, tail: Tail) -> None:
        super().__init__(tail)
        self.slope = slope

    def compute(self, *pairs: Tensor | None) -> Tensor:
        x = pairs[0]
        assert x is not None
        return torch.where(x > 0, x, x * per_channel(self.slope.flatten(), x, 1))

    def export(self, to: Integers) -> None:
        slope = self.slope.detach().flatten().float().expand(to.shape[0]).contiguous()
        to.step(graph.Rescale(to.value(0), (), None, slope=slope))
