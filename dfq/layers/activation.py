"""Activations that fp32 operations define: they end the step of the call in front of them, or rescale a stream."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from dfq.engine import graph
from dfq.layers.integers import Integers
from dfq.layers.kind import Kind, Layer, register
from dfq.layers.slope import with_mean_slope
from dfq.layers.tail import Activated, Tail, activate
from dfq.network.calls import Call
from dfq_kernels.activations import Activation, activation_of

_PLAIN = {
    "aten.relu.default": "relu", "aten.relu6.default": "relu6", "aten.hardsigmoid.default": "hardsigmoid",
    "aten.hardswish.default": "hardswish",
}  # fmt: skip
_CLAMPS = ("aten.hardtanh.default", "aten.clamp.default", "aten.clamp_min.default", "aten.clamp_max.default")
LARGEST = float("inf")


@register
class FusedActivation(Kind):
    """`t = act(t)` in fp32, at the end of the step before it where it alone reads that; else `t = act((x - z) * s)`."""

    name = "activation"
    calls = (*_PLAIN, *_CLAMPS, "aten.leaky_relu.default")
    activation = rectifies = True

    def text(self, call: Call) -> str:
        given = call.arguments()
        if call.target in _PLAIN:
            return _PLAIN[call.target]
        if call.target in _CLAMPS:
            low, high = (_number(given, *names, default=end) for names, end in _ENDS)
            return _clamp(low, high)
        return str(Activation("leaky_relu", activation_of(f"leaky_relu({given['negative_slope']})").a))

    def never_negative(self, call: Call, operands: list[bool]) -> bool:
        known = activation_of(self.text(call))
        highest = known.bounds[1] if known.bounds is not None else LARGEST
        return known.never_negative or (operands[0] and highest >= 0)

    def layer(self, call: Call, tail: Tail) -> Layer:
        return Ending(tail)


_ENDS = ((("min_val", "min"), -LARGEST), (("max_val", "max"), LARGEST))


def _number(given: dict[str, Any], *names: str, default: float) -> float:
    for name in names:
        if given.get(name) is not None:
            return float(given[name])
    return default


def _clamp(low: float, high: float) -> str:
    if (low, high) == (0.0, 6.0):
        return "relu6"
    return "relu" if (low, high) == (0.0, LARGEST) else str(Activation("hardtanh", low, high))


class Ending(Layer):
    """Nothing but an activation and a quantizer, on a value that others read as well."""

    def compute(self, *pairs: Tensor | None) -> Tensor:
        assert pairs[0] is not None
        return pairs[0]

    def forward(self, *pairs: Tensor | None) -> Activated:
        x, scale = pairs
        if not self.training or scale is None or not activation_of(self.tail.activation).saturates:
            return super().forward(*pairs)
        assert x is not None
        out = with_mean_slope(partial(activate, text=self.tail.activation), x, scale)
        return out if self.tail.quantizer is None else self.tail.quantizer(out)  # type: ignore[no-any-return]

    def export(self, to: Integers) -> None:
        to.step(graph.Rescale(to.value(0), (), None))
