"""One call of a captured network: what is called, with what, and of which shape."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

MODULE = "dfq_module"  # where a node's meta keeps the name of the user's module that made the call


@dataclass(frozen=True)
class Call:
    """A node of a captured network.

    node: of its graph; tensors: the network's parameters, buffers and constants by name.
    """

    node: fx.Node
    tensors: dict[str, Tensor]

    @property
    def target(self) -> str:
        """`aten.conv2d.default`, for example."""
        return target_of(self.node)

    @property
    def module(self) -> str:
        """The user's module that made the call; empty for the network itself."""
        return str(self.node.meta.get(MODULE, ""))

    @property
    def where(self) -> str:
        """The call, for people: `layer1.0 (aten.add.Tensor)`."""
        return f"{self.module or 'the model'} ({self.target})"

    @property
    def shape(self) -> tuple[int, ...]:
        """Of its result, for one image."""
        return shape_of(self.node)

    def arguments(self) -> dict[str, Any]:
        """Every argument by its name, defaults too; tensors are nodes."""
        return arguments_of(self.node)

    def constant(self, argument: Any) -> Tensor | None:
        """A tensor that does not depend on the images: a parameter, a buffer or a constant; a number as one."""
        if isinstance(argument, fx.Node):
            return self.tensors.get(str(argument.target)) if argument.op == "get_attr" else None
        if isinstance(argument, (int, float)) and not isinstance(argument, bool):
            return torch.tensor(float(argument))
        return None

    @property
    def operands(self) -> list[fx.Node]:
        """The values that it reads and that depend on the images, in order, each as often as it is read."""
        found: list[fx.Node] = []
        fx.map_arg((self.node.args, self.node.kwargs), lambda item: found.append(item) if is_value(item) else None)
        return found


def is_value(node: fx.Node) -> bool:
    """Whether a node is a tensor (or some) that depends on the images."""
    return node.op != "get_attr" and not is_size(node)


def is_size(node: fx.Node) -> bool:
    """Whether a node is a number of the batch, no tensor."""
    value = node.meta.get("val")
    return isinstance(value, (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool))


def target_of(node: fx.Node) -> str:
    """What a node calls: an operator as `aten.conv2d.default`, a function by its `__name__`, else its text."""
    return (
        str(node.target)
        if isinstance(node.target, torch._ops.OpOverload)
        else getattr(node.target, "__name__", str(node.target))
    )


def arguments_of(node: fx.Node) -> dict[str, Any]:
    """Every argument by its name in the operator's schema."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return {str(index): value for index, value in enumerate(node.args)} | dict(node.kwargs)
    found: dict[str, Any] = {}
    for index, argument in enumerate(node.target._schema.arguments):
        if index < len(node.args):
            found[argument.name] = node.args[index]
        elif argument.name in node.kwargs:
            found[argument.name] = node.kwargs[argument.name]
        elif argument.has_default_value():
            found[argument.name] = argument.default_value
    return found


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """Of a value, for one image; the first axis is the batch."""
    return tuple(int(side) for side in node.meta["val"].shape[1:])


def per_image(node: fx.Node) -> bool:
    """Whether a value's first axis is the batch and no other axis depends on it."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.dim() == 0:
        return False
    batch, *sides = value.shape
    dynamic = isinstance(batch, torch.SymInt) and batch.node.expr.is_symbol
    return dynamic and all(isinstance(side, int) for side in sides)
