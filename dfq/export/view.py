"""The integer network as one layer sees it while it is made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

from dfq.engine.graph import Grid, Layer, Step, as_map
from dfq.export.items import ExportError, Item, Open, in_order, integer_weight

if TYPE_CHECKING:
    from dfq.export.integers import Exporter

Place = Callable[[Tensor], Tensor]


class View:
    """The integer network as one layer sees it (`dfq.layers.integers.Integers`)."""

    def __init__(self, exporter: Exporter, node: fx.Node, name: str, weighted: bool) -> None:
        self.exporter, self.node, self.name = exporter, node, name
        self.shape = exporter.seen_shape(node)
        arguments = node.args[:1] if weighted else node.args[::2] if node.op == "call_module" else node.all_input_nodes
        self.items = [exporter.items[item] for item in arguments]  # type: ignore[index]

    def operand_shape(self, index: int) -> tuple[int, ...]:
        return self.items[index].shape

    def value(self, index: int, place: Place | None = None) -> str:
        item = self.items[index]
        order = item.places() if place is None else place(item.places())
        return self.exporter.gather(item, order, as_map(tuple(order.shape[1:])), f"{self.node.name}_input{index}")

    def flat(self, index: int) -> str:
        item = self.items[index]
        if len(item.bases) == 1 and isinstance(item.bases[0], str) and (item.order is None or in_order(item.order)):
            size = self.exporter._sizes([item])[item.bases[0]]
            if size == item.places().numel():
                return item.bases[0]
        return self.value(index)

    def grid(self, name: str) -> Grid:
        return self.exporter.grids[name]

    def weight(self) -> tuple[Tensor, Tensor, int]:
        quantizer, weight = self.exporter.weights[self.name]
        integers, scale = integer_weight(self.name, quantizer, weight)
        return integers.to(torch.int8), scale, quantizer.bits

    def step(self, step: Step, made: tuple[int, int, int] | None = None, order: Place | None = None) -> None:
        made = made or as_map(self.shape)
        places = None
        if order is not None:
            count = made[0] * made[1] * made[2]
            places = order(torch.arange(count, dtype=torch.float64))
        self.exporter.open(self.node, step, made, places)

    def kept(self, step: Step, made: tuple[int, int, int] | None = None) -> None:
        opened = Open(step, made or as_map(self.shape))
        self.exporter.order.append(opened)
        name = self.exporter.named(opened, self.grid(step.x), self.node.name)
        self.exporter.items[self.node] = Item((name,), self.shape)

    def add(self, first: int, second: int, make: Callable[[str, str], Step]) -> None:
        one, two = self.items[first], self.items[second]
        if not one.quantized or not two.quantized:
            self._accumulate(one, two)
            return
        if one.shape != self.shape:
            first, second, one, two = second, first, two, one
        same = one.order is two.order or (one.order is not None and two.order is not None
                                          and torch.equal(one.order, two.order))  # fmt: skip
        bases = (*one.bases, *two.bases)
        maps = [self.exporter.maps[base] for base in bases if isinstance(base, str)]
        filled = one.padded or two.padded  # what fills the result is what both fills give
        if one.shape == two.shape and same and not filled and len(bases) == 2 and maps[0] == maps[1]:
            x, other = str(one.bases[0]), str(two.bases[0])
            step = make(x, other)
            self.exporter.open(self.node, step, maps[0], one.order)
            return
        self.step(
            make(self.value(first), self.value(second, None if _spreads(two.shape, self.shape) else self._expand))
        )

    def _expand(self, places: Tensor) -> Tensor:
        return places.expand(1, *self.shape)

    def _accumulate(self, one: Item, two: Item) -> None:
        """A residual is added to the sums of the layer in front."""
        raw, other = (one, two) if not one.quantized else (two, one)
        opened = raw.bases[0]
        alone = len(raw.bases) == 1 and isinstance(opened, Open) and isinstance(opened.step, Layer)
        if not alone or not isinstance(opened, Open) or not other.quantized or opened.outs or opened.step.activation:
            raise ExportError(f"export: one side of {self.node.name} must be quantized, the other one a layer's sums")
        if not isinstance(opened.step, Layer) or opened.step.residual is not None:
            raise ExportError(f"export: {self.node.name} must not add to sums that have a residual already")
        places = other.places().expand(1, *self.shape).reshape(-1)
        if raw.order is not None:  # as the sums lie
            back = torch.empty_like(places)
            back[raw.order.reshape(-1).long()] = places
            places = back
        residual = self.exporter.gather(other, places, opened.made, f"{self.node.name}_residual")
        opened.step = replace(opened.step, residual=residual)
        self.exporter.order.remove(opened)
        self.exporter.order.append(opened)  # its residual is there by now
        self.exporter.items[self.node] = raw


def _spreads(shape: tuple[int, ...], over: tuple[int, ...]) -> bool:
    """Whether a step can spread a value over a map by itself."""
    if shape == over:
        return True
    channels = shape[0] == over[0] and all(side == 1 for side in shape[1:])
    return channels or (shape[0] == 1 and shape[1:] == over[1:])
