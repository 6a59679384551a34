"""Largest integers of windows, of the map, of any axes: rounding keeps the order, so the grid is that of the input."""

from __future__ import annotations

import math
from typing import ClassVar

from dfq.engine import graph
from dfq.layers.integers import Integers
from dfq.layers.kind import ON_A_GRID, Kind, Read, register, sides
from dfq.network.calls import Call, shape_of
from dfq.network.normalize import ADAPTIVE_MAX

_PLAIN = ("aten.max_pool1d.default", "aten.max_pool2d.default")


@register
class MaxPool(Kind):
    """The largest integer of each window of a kernel; the grid stays."""

    name = "max pool"
    calls: ClassVar[tuple[str, ...]] = _PLAIN

    def reads(self, call: Call, bits: int) -> list[Read]:
        return [ON_A_GRID]

    def keeps_grid(self, call: Call) -> bool:
        return True

    def never_negative(self, call: Call, operands: list[bool]) -> bool:
        return operands[0]

    def export(self, call: Call, to: Integers) -> None:
        given, axes = call.arguments(), 1 if call.target == _PLAIN[0] else 2
        x = to.value(0, (lambda x: x.unsqueeze(-2)) if axes == 1 else None)
        to.kept(graph.MaxPool(
            x, (), None, sides(given["kernel_size"], axes, 1),
            sides(given["stride"] or given["kernel_size"], axes, 1), sides(given["padding"], axes, 0),
            sides(given["dilation"], axes, 1), bool(given["ceil_mode"]),
        ))  # fmt: skip


@register
class AdaptiveMaxPool(MaxPool):
    """The largest integer of each window, as many windows an axis as the result has places; the grid stays."""

    name = "adaptive max pool"
    calls = (ADAPTIVE_MAX,)

    def export(self, call: Call, to: Integers) -> None:
        *_, height, width = call.shape
        flat = len(call.shape) == 2
        x = to.value(0, (lambda x: x.unsqueeze(-2)) if flat else None)
        to.kept(graph.MaxPool(x, (), None, None, output=(1 if flat else height, width)))


@register
class Maximum(Kind):
    """The maximum over some axes: of one row of pixels, with what is left as channels."""

    name = "maximum"
    calls = ("aten.amax.default",)

    def why_float(self, call: Call) -> str | None:
        dims = _dims(call)
        return "it is over the images" if 0 in dims or not dims else None

    def reads(self, call: Call, bits: int) -> list[Read]:
        return [ON_A_GRID]

    def keeps_grid(self, call: Call) -> bool:
        return True

    def never_negative(self, call: Call, operands: list[bool]) -> bool:
        return operands[0]

    def export(self, call: Call, to: Integers) -> None:
        dims, shape = _dims(call), to.operand_shape(0)
        if dims == [2, 3] and len(shape) == 3:
            to.kept(graph.MaxPool(to.value(0), (), None, shape[1:], shape[1:]), (shape[0], 1, 1))  # type: ignore[arg-type]
            return
        kept = [dim for dim in range(1, len(shape) + 1) if dim not in dims]
        left, gone = (math.prod(shape[dim - 1] for dim in some) for some in (kept, dims))
        x = to.value(0, lambda x: x.permute(0, *kept, *dims).reshape(1, left, 1, gone))
        to.kept(graph.MaxPool(x, (), None, (1, gone), (1, gone)), (left, 1, 1))


def _dims(call: Call) -> list[int]:
    dim, axes = call.arguments()["dim"], len(shape_of(call.operands[0])) + 1
    return sorted(int(item) % axes for item in ([dim] if isinstance(dim, int) else dim))
