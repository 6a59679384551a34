"""Functions of one argument as tables: `t = values[q - quant_min]`, one fp32 number for every integer of 8 bits.

The values are those of the function in float64, rounded once; the exact forward looks up the same ones.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dfq.engine import graph
from dfq.layers.integers import Integers
from dfq.layers.kind import Kind, Layer, Read, integers_of, register
from dfq.layers.slope import with_mean_slope
from dfq.layers.tail import Tail
from dfq.network.calls import Call
from dfq_kernels.integers import Grid

BITS = 8  # of the argument
Function = Callable[[Tensor], Tensor]


def _power(x: Tensor, exponent: float) -> Tensor:
    return x**exponent


# the call: its name in an integer network, the function by its arguments, whether no result is negative
_FUNCTIONS: dict[str, tuple[str, Callable[[dict[str, Any]], Function], bool]] = {
    "aten.silu.default": ("silu", lambda _: F.silu, False),
    "aten.sigmoid.default": ("sigmoid", lambda _: torch.sigmoid, True),
    "aten.tanh.default": ("tanh", lambda _: torch.tanh, False),
    "aten.gelu.default": ("gelu", lambda given: partial(F.gelu, approximate=given["approximate"]), False),
    "aten.elu.default": ("elu", lambda given: partial(torch.ops.aten.elu.default, alpha=given["alpha"],
                                                      scale=given["scale"], input_scale=given["input_scale"]), False),
    "aten.celu.default": ("celu", lambda given: partial(F.celu, alpha=given["alpha"]), False),
    "aten.selu.default": ("selu", lambda _: F.selu, False),
    "aten.softplus.default": ("softplus", lambda given: partial(F.softplus, beta=given["beta"],
                                                                threshold=given["threshold"]), True),
    "aten.mish.default": ("mish", lambda _: F.mish, False),
    "aten.log_sigmoid.default": ("log_sigmoid", lambda _: F.logsigmoid, False),
    "aten.softsign.default": ("softsign", lambda _: F.softsign, False),
    "aten.hardshrink.default": ("hardshrink", lambda given: partial(F.hardshrink, lambd=given["lambd"]), False),
    "aten.softshrink.default": ("softshrink", lambda given: partial(F.softshrink, lambd=given["lambd"]), False),
    "aten.tanhshrink.default": ("tanhshrink", lambda _: F.tanhshrink, False),
    "aten.abs.default": ("abs", lambda _: torch.abs, True),
    "aten.square.default": ("square", lambda _: torch.square, True),
    "aten.pow.Tensor_Scalar": ("pow", lambda given: partial(_power, exponent=float(given["exponent"])), False),
    "aten.exp.default": ("exp", lambda _: torch.exp, True),
    "aten.sin.default": ("sin", lambda _: torch.sin, False),
    "aten.cos.default": ("cos", lambda _: torch.cos, False),
    "aten.threshold.default": ("threshold", lambda given: partial(F.threshold, threshold=float(given["threshold"]),
                                                                  value=float(given["value"])), False),
}  # fmt: skip


@register
class TableFunction(Kind):
    """`t = f(x)`, looked up: x has 8 bits, so f has at most 256 values. Powers are whole and not negative."""

    name = "table"
    calls = tuple(_FUNCTIONS)
    rectifies = True

    def why_float(self, call: Call) -> str | None:
        exponent = float(call.arguments().get("exponent", 1.0))
        whole = exponent >= 0 and exponent == int(exponent)
        return None if whole else "its power is not defined for all numbers"

    def reads(self, call: Call, bits: int) -> list[Read]:
        return [BITS]

    def never_negative(self, call: Call, operands: list[bool]) -> bool:
        return _FUNCTIONS[call.target][2]

    def layer(self, call: Call, tail: Tail) -> Layer:
        name, make, _ = _FUNCTIONS[call.target]
        given = call.arguments()
        plain = name != "gelu" or given["approximate"] == "none"
        return QuantTable(make(given), name if plain else f"{name}_{given['approximate']}", tail)


class QuantTable(Layer):
    """A function of one argument. It has no parameters: what it computes of a range is computed when it is needed."""

    def __init__(self, function: Function, name: str, tail: Tail) -> None:
        super().__init__(tail)
        self.function, self.function_name = function, name

    def compute(self, *pairs: Tensor | None) -> Tensor:
        x, scale = pairs
        assert x is not None
        return self.function(x) if scale is None else with_mean_slope(self.function, x, scale)

    def exact(self, *pairs: Tensor | None) -> Tensor:
        x, scale = pairs
        assert x is not None
        if scale is None:
            return self.function(x)
        q = integers_of(x, scale)
        low, high = int(q.min()), int(q.max())
        return self._values(torch.arange(low, high + 1, device=x.device), scale)[(q - low).long()]

    def table(self, grid: Grid) -> Tensor:
        whole = torch.arange(grid.quant_min, grid.quant_max + 1) - grid.zero_point
        return self._values(whole, torch.tensor(grid.scale))

    def _values(self, whole: Tensor, scale: Tensor) -> Tensor:
        """The function of `whole * scale`, the product rounded as every real value is."""
        argument = whole.float() * scale.float()
        return self.function(argument.double()).float()

    def export(self, to: Integers) -> None:
        x = to.value(0)
        grid: Grid = to.grid(x)
        to.step(graph.Table(x, (), None, self.table(grid), self.function_name))
