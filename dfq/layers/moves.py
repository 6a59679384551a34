"""Calls that put elements to other places: integers stay what they are, and the grid passes through."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from dfq.layers.kind import AS_IT_IS, Kind, Read, register
from dfq.network.calls import Call

ENDLESS = float("inf")
_SCATTERS = ("aten.slice_scatter.default", "aten.select_scatter.default")


@register
class Move(Kind):
    """Every element of the result is one of the operand's: reshapes, permutations, slices, shuffles, repetitions."""

    name = "move"
    calls = tuple(
        f"aten.{name}" for name in (
            "reshape.default", "flatten.using_ints", "unflatten.int", "permute.default", "transpose.int", "t.default",
            "movedim.int", "movedim.intlist", "swapaxes.default", "numpy_T.default", "squeeze.default", "squeeze.dim",
            "squeeze.dims", "unsqueeze.default", "slice.Tensor", "select.int", "narrow.default", "expand.default",
            "expand_as.default", "broadcast_to.default", "repeat.default", "tile.default", "flip.default",
            "roll.default", "pixel_shuffle.default", "pixel_unshuffle.default", "channel_shuffle.default",
            "native_channel_shuffle.default", "reshape_as.default", "view_as.default", "repeat_interleave.self_int",
            "reflection_pad1d.default", "reflection_pad2d.default", "replication_pad1d.default",
            "replication_pad2d.default", "upsample_nearest1d.vec", "upsample_nearest2d.vec",
            "upsample_nearest1d.default", "upsample_nearest2d.default", "_upsample_nearest_exact1d.vec",
            "_upsample_nearest_exact2d.vec", "diagonal.default", "rot90.default",
        )
    )  # fmt: skip
    moves = True

    def reads(self, call: Call, bits: int) -> list[Read]:
        return [AS_IT_IS] * len(call.operands)

    def keeps_grid(self, call: Call) -> bool:
        return True

    def never_negative(self, call: Call, operands: list[bool]) -> bool:
        return operands[0]


@register
class Pad(Kind):
    """Padding by a constant, on any side. One that is not 0 has to be on a grid that reaches so far."""

    name = "pad"
    calls = ("aten.pad.default", "aten.constant_pad_nd.default")
    moves = True

    def why_float(self, call: Call) -> str | None:
        given = call.arguments()
        mode = given.get("mode", "constant")
        return None if mode in ("constant", "reflect", "replicate", "circular") else f"it pads by {mode}"

    def reads(self, call: Call, bits: int) -> list[Read]:
        return [AS_IT_IS]

    def keeps_grid(self, call: Call) -> bool:
        return self.fill(call) in (None, 0.0, -ENDLESS)

    def never_negative(self, call: Call, operands: list[bool]) -> bool:
        return operands[0] and (self.keeps_grid(call) or float(self.fill(call) or 0.0) >= 0)

    def fill(self, call: Call) -> float | None:
        given = call.arguments()
        return float(given.get("value") or 0.0) if given.get("mode", "constant") == "constant" else None

    def place(self, call: Call, *arguments: Any, **keywords: Any) -> Tensor:
        given = call.arguments()
        sides = [int(side) for side in given["pad"]]
        if given.get("mode", "constant") != "constant":
            return F.pad(arguments[0], sides, given["mode"])
        return F.pad(arguments[0], sides, value=-1.0)


@register
class Concatenate(Kind):
    """Several values side by side, or one written into a part of another, on one grid."""

    name = "concatenation"
    calls = ("aten.cat.default", "aten.concat.default", "aten.stack.default", *_SCATTERS)
    moves = True

    def why_float(self, call: Call) -> str | None:
        given = call.arguments()
        values = (given["self"], given["src"]) if call.target in _SCATTERS else given["tensors"]
        if any(call.constant(item) is not None for item in values):
            return "a constant is among its values"
        return "it is along the images" if int(given["dim"]) % (len(call.shape) + 1) == 0 else None

    def reads(self, call: Call, bits: int) -> list[Read]:
        return [AS_IT_IS] * len(call.operands)

    def never_negative(self, call: Call, operands: list[bool]) -> bool:
        return all(operands)
