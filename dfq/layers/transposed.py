"""Transposed convolutions: the convolution of the input with zeros between its pixels, its weight turned about.

Where windows do not meet (kernel and stride are the same, no padding) every pixel of the input makes its own window: a
convolution of single pixels makes all of a window's pixels as channels, and a move puts them side by side.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dfq.engine import graph
from dfq.layers.integers import Integers
from dfq.layers.kind import register, sides
from dfq.layers.tail import Tail
from dfq.layers.weighted import QuantLayer, Weighted, node_or_tensor
from dfq.network.calls import Call


@register
class TransposedConvolution(Weighted):
    """`acc = sum of (x - z) * weight`, of the input with `stride - 1` zeros between its pixels."""

    name = "transposed convolution"
    calls = ("aten.conv_transpose1d.default", "aten.conv_transpose2d.input")

    def layer(self, call: Call, tail: Tail) -> QuantLayer:
        weight = self.weight(call)
        return QuantTransposedConv(weight, self.bias(call), tail, _geometry(call, weight.dim() - 2))

    def oriented(self, call: Call, weight: Any) -> Any:
        return _turned(weight, tuple(self.weight(call).shape), int(call.arguments()["groups"]))


def _turned(weight: Any, shape: tuple[int, ...], groups: int) -> Any:
    """`[in, out / groups, ...]` as `[out, in / groups, ...]`; of a tensor or a node."""
    weight = node_or_tensor(weight, "reshape", (groups, shape[0] // groups, *shape[1:]))
    weight = node_or_tensor(weight, "transpose", 1, 2)
    return node_or_tensor(weight, "reshape", (groups * shape[1], shape[0] // groups, *shape[2:]))


def _geometry(call: Call, axes: int) -> dict[str, Any]:
    given = call.arguments()
    return {
        "stride": sides(given["stride"], axes, 1), "padding": sides(given["padding"], axes, 0),
        "output_padding": sides(given["output_padding"], axes, 0), "dilation": sides(given["dilation"], axes, 1),
        "groups": int(given["groups"]),
    }  # fmt: skip


class QuantTransposedConv(QuantLayer):
    """A transposed convolution whose weight arrives fake-quantized, output channels first."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, tail: Tail, geometry: dict[str, Any]) -> None:
        super().__init__(weight, bias, tail)
        self.geometry = geometry

    def oriented(self) -> Tensor:
        turned: Tensor = _turned(self.weight, tuple(self.weight.shape), self.geometry["groups"])
        return turned

    def accumulate(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        groups = self.geometry["groups"]
        if flat := weight.dim() == 3:
            x, weight = x.unsqueeze(-2), weight.unsqueeze(-2)
        out, inner, *kernel = weight.shape
        weight = weight.reshape(groups, out // groups, inner, *kernel).transpose(1, 2)
        weight = weight.reshape(groups * inner, out // groups, *kernel)
        result = F.conv_transpose2d(x, weight, bias, **self.geometry)
        return result.squeeze(-2) if flat else result

    def export(self, to: Integers) -> None:
        integers, _, _ = to.weight()
        out, inner, *spans = integers.shape
        kernel: tuple[int, int] = (1, *spans)[-2:]  # type: ignore[assignment]
        common = self.constants_for(to, self._input(to, kernel), (out, inner, *kernel))
        if self._apart(kernel):
            *_, width = to.operand_shape(0)
            height = 1 if self.weight.dim() == 3 else to.operand_shape(0)[1]
            made = out * kernel[0] * kernel[1], height, width
            to.step(graph.Layer(**self._windows(common, kernel)), made, self._side_by_side(to, kernel, made))
            return
        common["weight"] = common["weight"].flip((2, 3))
        to.step(graph.Layer(**common, dilation=self.geometry["dilation"], groups=self.geometry["groups"]))

    def _apart(self, kernel: tuple[int, int]) -> bool:
        known = self.geometry
        plain = not any(known["padding"]) and not any(known["output_padding"])
        return plain and known["stride"] == kernel and known["dilation"] == (1, 1) and known["groups"] == 1

    def _windows(self, common: dict[str, Any], kernel: tuple[int, int]) -> dict[str, Any]:
        """Channels `[out, kernel y, kernel x]` of single pixels."""
        count, weight = kernel[0] * kernel[1], common["weight"]
        common["weight"] = weight.permute(0, 2, 3, 1).reshape(-1, weight.shape[1], 1, 1).contiguous()
        for name in ("mult", "bias"):
            common[name] = common[name].repeat_interleave(count)
        return common

    def _side_by_side(self, to: Integers, kernel: tuple[int, int], made: tuple[int, int, int]) -> Any:
        def order(elements: Tensor) -> Tensor:
            parts = elements.reshape(1, -1, *kernel, *made[1:]).permute(0, 1, 4, 2, 5, 3)
            return parts.reshape(1, *to.shape)

        return order

    def _input(self, to: Integers, kernel: tuple[int, int]) -> str:
        if self._apart(kernel):
            return to.value(0)
        known = self.geometry

        def spread(x: Tensor) -> Tensor:
            x = x.unsqueeze(-2) if x.dim() == 3 else x
            (sy, sx), height, width = known["stride"], x.shape[2], x.shape[3]
            apart = torch.full((*x.shape[:2], (height - 1) * sy + 1, (width - 1) * sx + 1), -1.0, dtype=x.dtype)
            apart[:, :, ::sy, ::sx] = x
            before = [d * (k - 1) - p for d, k, p in zip(known["dilation"], kernel, known["padding"], strict=True)]
            after = [b + extra for b, extra in zip(before, known["output_padding"], strict=True)]
            return F.pad(apart, (before[1], after[1], before[0], after[0]), value=-1)

        return to.value(0, spread)
