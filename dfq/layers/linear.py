"""Linear layers, along the last axis of any shape: the convolution of single pixels."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from dfq.engine import graph
from dfq.layers.integers import Integers
from dfq.layers.kind import register
from dfq.layers.tail import Tail
from dfq.layers.weighted import QuantLayer, Weighted
from dfq.network.calls import Call


@register
class Linear(Weighted):
    """`t = float(acc) * mult[o] + bias[o]`, `acc` the sum over the last axis of `(x - z) * weight[o]`."""

    name = "linear"
    calls = ("aten.linear.default",)

    def layer(self, call: Call, tail: Tail) -> QuantLayer:
        return QuantLinear(self.weight(call), self.bias(call), tail)

    def joins_batch_norm(self, call: Call) -> bool:
        return len(call.shape) == 1


class QuantLinear(QuantLayer):
    """A linear layer whose weight arrives fake-quantized."""

    channel_axis = -1

    def accumulate(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def patches(self, x: Tensor, places: int, random: torch.Generator) -> Tensor | None:
        rows = x.reshape(-1, x.shape[-1])
        most = places * len(x)
        if len(rows) > most:
            rows = rows[torch.randperm(len(rows), generator=random)[:most].to(x.device)]
        return rows.t()[None]

    def export(self, to: Integers) -> None:
        out, inner = self.weight.shape
        *others, _ = to.operand_shape(0)
        if not others:
            to.step(graph.Layer(**self.constants_for(to, to.flat(0), (out, inner))))
            return
        places = math.prod(others)  # features become channels, all other axes one row of pixels
        x = to.value(0, lambda x: x.reshape(1, places, inner).transpose(1, 2))
        step = graph.Layer(**self.constants_for(to, x, (out, inner, 1, 1)))
        to.step(
            step, (out, 1, places), lambda made: made.reshape(1, out, places).transpose(1, 2).reshape(1, *others, out)
        )
