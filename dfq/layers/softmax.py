"""Softmax of an output: floating point, on the real numbers that the last step gives. Between layers it stays float."""

from __future__ import annotations

from dfq.layers.kind import AS_IT_IS, Kind, Read, register
from dfq.network.calls import Call

FUNCTIONS = {"aten.softmax.int": "softmax", "aten.log_softmax.int": "log_softmax",
             "aten._softmax.default": "softmax", "aten._log_softmax.default": "log_softmax"}  # fmt: skip


@register
class Softmax(Kind):
    """`exp(x) / (the sum of exp(x) along an axis)`, or its logarithm: the function of an output, no step."""

    name = "softmax of an output"
    calls = tuple(FUNCTIONS)

    def why_float(self, call: Call) -> str | None:
        if any(reader.op != "output" for reader in call.node.users):
            return "it lies between layers"
        return "it is over the images" if int(call.arguments()["dim"]) % (len(call.shape) + 1) == 0 else None

    def reads(self, call: Call, bits: int) -> list[Read]:
        return [AS_IT_IS]

    def never_negative(self, call: Call, operands: list[bool]) -> bool:
        return FUNCTIONS[call.target] == "softmax"

    def ends(self, call: Call) -> tuple[str, int]:
        """What it is as the function of an output, and along which axis of `[N, ...]`."""
        return FUNCTIONS[call.target], int(call.arguments()["dim"]) % (len(call.shape) + 1)
