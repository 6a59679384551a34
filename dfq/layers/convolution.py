"""Convolutions of one and two axes: `acc = sum of (x - zero_point) * weight`, one multiplier and bias per channel.

A 1-D convolution is a 2-D one of height 1. Padding inserts the zero point, which is 0 of the real numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dfq_kernels
from dfq.engine import graph
from dfq.layers.integers import Integers
from dfq.layers.kind import register, sides
from dfq.layers.tail import Tail
from dfq.layers.weighted import QuantLayer, Weighted
from dfq.network.calls import Call


@register
class Convolution(Weighted):
    """`t = conv(x, w) + b` over one or two axes, in groups, with any padding."""

    name = "convolution"
    calls = ("aten.conv1d.default", "aten.conv2d.default", "aten.conv1d.padding", "aten.conv2d.padding")

    def why_float(self, call: Call) -> str | None:
        known = super().why_float(call)
        weight = call.constant(call.arguments()["weight"])
        if known is None and weight is not None and weight.dim() != len(call.shape) + 1:
            return "its input has no axis for the batch"
        return known

    def layer(self, call: Call, tail: Tail) -> QuantLayer:
        return QuantConv(self.weight(call), self.bias(call), tail, geometry(call))


def geometry(call: Call) -> dict[str, Any]:
    """stride, padding, dilation and groups as pairs for height and width; after: how much more padding there is on the
    right and below than on the left and above (`padding="same"` of an even kernel)."""
    given, weight = call.arguments(), call.constant(call.arguments()["weight"])
    assert weight is not None
    axes = weight.dim() - 2
    stride, dilation = sides(given["stride"], axes, 1), sides(given["dilation"], axes, 1)
    padding, after = given["padding"], (0, 0)
    if isinstance(padding, str):
        kernel = (1, *weight.shape[2:])[-2:]
        spans = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, kernel, strict=True)]
        padding, after = [span // 2 for span in spans], (spans[0] % 2, spans[1] % 2)
        padding = padding[-axes:]
    return {"stride": stride, "padding": sides(padding, axes, 0), "dilation": dilation, "groups": given["groups"],
            "after": after}  # fmt: skip


class QuantConv(QuantLayer):
    """A convolution whose weight arrives fake-quantized."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, tail: Tail, geometry: dict[str, Any]) -> None:
        super().__init__(weight, bias, tail)
        self.geometry, self.after = {key: geometry[key] for key in _GEOMETRY}, geometry["after"]

    def accumulate(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x, weight = self._map(x), wide(weight)
        return self._as(F.conv2d(x, weight, bias, **self.geometry))

    def fake_quantized(self, x: Tensor, x_scale: Tensor | None, weight: Tensor, weight_scale: Tensor) -> Tensor:
        if x_scale is None:
            return self.accumulate(x, weight, self.bias)
        kind = x.device.type
        autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        out = dfq_kernels.fake_quant_conv2d(
            self._map(x), x_scale, wide(weight), weight_scale, self.bias, **self.geometry,
            dtype=torch.get_autocast_dtype(kind) if autocast and x.dtype != torch.float64 else None,
        )  # fmt: skip
        return self._as(out)

    def patches(self, x: Tensor, places: int, random: torch.Generator) -> Tensor | None:
        kernel, (groups, rest) = tuple(wide(self.weight).shape[2:]), (self.geometry["groups"], dict(self.geometry))
        del rest["groups"]
        drawn = []
        for images in self._map(x).split(PATCH_IMAGES):
            columns = F.unfold(images, kernel, **rest)  # [N, C K, places]
            count = columns.shape[2]
            if count > places:
                chosen = torch.randint(count, (len(images), 1, places), generator=random).to(x.device)
                columns = columns.gather(2, chosen.expand(-1, columns.shape[1], -1))
            drawn.append(columns)
        samples = torch.cat(drawn).transpose(0, 1).flatten(1)
        return samples.view(groups, len(samples) // groups, -1)

    def _map(self, x: Tensor) -> Tensor:
        x = x.unsqueeze(-2) if self.weight.dim() == 3 else x
        return F.pad(x, (0, self.after[1], 0, self.after[0])) if any(self.after) else x

    def _as(self, out: Tensor) -> Tensor:
        return out.squeeze(-2) if self.weight.dim() == 3 else out

    def export(self, to: Integers) -> None:
        def padded(x: Tensor) -> Tensor:
            return F.pad(self._map_of(x), (0, self.after[1], 0, self.after[0]), value=-1)

        x = to.value(0, padded if any(self.after) else None)
        shape = (self.weight.shape[0], self.weight.shape[1], *((1,) if self.weight.dim() == 3 else ()),
                 *self.weight.shape[2:])  # fmt: skip
        to.step(graph.Layer(**self.constants_for(to, x, shape), **self.geometry))

    def _map_of(self, x: Tensor) -> Tensor:
        return x.unsqueeze(-2) if self.weight.dim() == 3 else x


PATCH_IMAGES = 4  # at once: a patch takes as many times an image's memory as the kernel has taps
_GEOMETRY = ("stride", "padding", "dilation", "groups")


def wide(weight: Tensor) -> Tensor:
    """A weight of one axis as one of height 1."""
    return weight.unsqueeze(-2) if weight.dim() == 3 else weight
