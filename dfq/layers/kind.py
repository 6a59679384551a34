"""What a kind of layer says about itself, and the one table of kinds.

A kind is one file in this folder, read from top to bottom: which ATen calls it is; what it wants of the values that it
reads; what it promises of its result; the layer in training; its exact forward; its step in integers. `dfq.quant` and
`dfq.export` walk a network and ask; they know no kind by name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from dfq.layers.tail import Activated, Tail
from dfq.network.calls import Call, per_image, target_of

if TYPE_CHECKING:
    from dfq.layers.integers import Integers
    from dfq_kernels.integers import Grid

AS_IT_IS, ON_A_GRID, STREAM = "as it is", "on a grid", "stream"
"""How a call reads a value: as it is; quantized somehow; with the bits of streams. A number: with these bits."""
Read = str | int


class Layer(nn.Module):
    """The layer of a quantized network that a call became.

    It takes `(value, scale)` for every value that the call reads, one after the other; a scale of None marks a value
    that is not quantized. In training it runs on fake-quantized values, fast and differentiable; in evaluation it runs
    the exact forward, as the integer network will.

    averages: whether its result is a mean over positions of what it reads.
    """

    averages = False

    def __init__(self, tail: Tail) -> None:
        super().__init__()
        self.tail = tail

    def compute(self, *pairs: Tensor | None) -> Tensor:
        """The call on fake-quantized values."""
        raise TypeError(f"{type(self).__name__} must define compute")

    def exact(self, *pairs: Tensor | None) -> Tensor:
        """What the integer step computes before its activation; fp32, every operation rounded on its own."""
        return self.compute(*pairs)

    def table(self, grid: Grid) -> Tensor | None:
        """What `exact` makes of every integer of a grid, fp32, where the layer is a function of one argument."""
        return None

    def export(self, to: Integers) -> None:
        """Adds the integer step."""
        raise TypeError(f"{type(self).__name__} must define export")

    def forward(self, *pairs: Tensor | None) -> Activated:
        if self.training:
            return self.tail(self.compute(*pairs))
        device = next(value.device.type for value in pairs if value is not None)
        with torch.no_grad(), torch.autocast(device, enabled=False):
            return self.tail.finish(self.exact(*(None if value is None else value.float() for value in pairs)))


class Kind:
    """All that is known about a kind of layer. A registered kind holds nothing; every call of it is asked of one."""

    name: ClassVar[str] = ""
    calls: ClassVar[tuple[str, ...]] = ()
    moves: ClassVar[bool] = False  # elements of its operands go to other places, and nothing else happens to them
    weighted: ClassVar[bool] = False  # it has a weight with bits of its own (`dfq.layers.weighted`)
    normalizes: ClassVar[bool] = False  # a batch norm: the constants of the layer in front of it can hold it
    sums: ClassVar[bool] = False  # an addition: one of its values may be the sums of a layer
    activation: ClassVar[bool] = False  # it may end the call in front of it, and is no step then

    rectifies: ClassVar[bool] = False  # what `activations="after_relu"` quantizes the results of

    def why_float(self, call: Call) -> str | None:
        """Why this call has no integer form; None if it has one."""
        return None

    def reads(self, call: Call, bits: int) -> list[Read]:
        """How the call reads each of its operands; bits: of a layer's input here."""
        return [STREAM] * len(call.operands)

    def never_negative(self, call: Call, operands: list[bool]) -> bool:
        """Whether no result is negative, given which operands never are."""
        return False

    def keeps_grid(self, call: Call) -> bool:
        """Whether its result has integers of its one operand, so that it needs no quantizer of its own."""
        return False

    def place(self, call: Call, *arguments: Any, **keywords: Any) -> Tensor:
        """Of a kind that moves: the call on index maps instead of its operands; -1 is what it fills with."""
        return call.node.target(*arguments, **keywords)  # type: ignore[operator, no-any-return]

    def fill(self, call: Call) -> float | None:
        """Of a kind that moves: the real number that it fills with; None: it fills nothing."""
        return None

    def export(self, call: Call, to: Integers) -> None:
        """Of a kind that keeps the grid and is no move: adds its step."""
        raise TypeError(f"{type(self).__name__} must define export")

    def ends(self, call: Call) -> tuple[str, int] | None:
        """Of a kind that is no step but the function of an output: its name in `dfq.engine.graph.Output`, its axis."""
        return None

    def text(self, call: Call) -> str | None:
        """Of an activation that fp32 operations define: as in `dfq_kernels.activations`."""
        return None

    def layer(self, call: Call, tail: Tail) -> Layer:
        """The layer in the quantized network; a kind that moves has none."""
        raise TypeError(f"{type(self).__name__} must define layer")


class Float(Kind):
    """A call without an integer form: it stays in floating point between quantized neighbours."""

    name = "float"
    reason: str

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def reads(self, call: Call, bits: int) -> list[Read]:
        return [AS_IT_IS] * len(call.operands)


_KINDS: dict[str, list[Kind]] = {}


def register(kind: type[Kind]) -> type[Kind]:
    """Makes a kind known: whoever captures a network with one of its calls then asks it.

    Several kinds may have a call (an addition of two values, of a constant): the first that does not say why it is none
    of its own takes it.
    """
    for call in kind.calls:
        _KINDS.setdefault(call, []).append(kind())
    return kind


def kind_of(call: Call) -> Kind:
    """The kind of a call; `Float` where there is none, or where all say why this call has no integer form."""
    kinds = _KINDS.get(target_of(call.node), [])
    if not kinds:
        return Float("no integer form is known")
    if not per_image(call.node) or not all(per_image(item) for item in call.operands):
        return Float("its first axis is not the batch")
    if not call.operands:
        return Float("it reads no image")
    if any(not item.meta["val"].is_floating_point() for item in (call.node, *call.operands)):
        return Float("it is of integers")
    reasons = [kind.why_float(call) for kind in kinds]
    taken = next((kind for kind, reason in zip(kinds, reasons, strict=True) if reason is None), None)
    return taken or Float("; ".join(dict.fromkeys(str(reason) for reason in reasons)))


def per_channel(values: Tensor, like: Tensor, axis: int) -> Tensor:
    """`values` shaped to broadcast along `axis`."""
    return values.reshape([-1 if dim == axis else 1 for dim in range(like.dim())])


def integers_of(value: Tensor, scale: Tensor) -> Tensor:
    """`q - zero_point` of a fake-quantized value, as whole numbers."""
    return torch.round(value * (1 / scale))


def sides(value: Any, axes: int, missing: int) -> tuple[int, int]:
    """Of height and width, of a call of one axis or two; missing: of the height that the former has none of."""
    values = [int(side) for side in value] if isinstance(value, (list, tuple)) else [int(value)]
    values = values * axes if len(values) == 1 else values
    first, second = [missing] * (2 - axes) + values
    return first, second
