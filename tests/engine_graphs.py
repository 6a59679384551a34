"""Integer networks made by hand, each of a pattern that real networks have, and what they compute by the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dfq.engine import Engine, IntegerGraph
from dfq.engine.graph import (
    IMAGES,
    Add,
    AveragePool,
    Layer,
    MaxPool,
    Move,
    Multiply,
    Output,
    Quantize,
    Rescale,
    Resize,
    Step,
    Table,
    as_map,
)
from dfq_kernels.integers import Grid

BYTES = Grid(0.05, 7, 0, 255)
SIGNED = Grid(0.04, -3, -128, 127)


def reference_values(graph: IntegerGraph, images: Tensor) -> dict[str, Tensor]:
    """Every value by the operators' references."""
    return Engine(graph, backend="reference")._network.values(images)


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """The values that differ."""
    return [name for name, value in found.items() if not torch.equal(value.flatten(), expected[name].flatten())]


class Builder:
    """A network as it grows; every method adds a step and gives its result's name."""

    def __init__(self, input_shape: tuple[int, ...], grid: Grid = BYTES) -> None:
        self.random = torch.Generator().manual_seed(0)
        self.input_shape = input_shape
        self.grids: dict[str, Grid] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.steps: list[Step] = []
        self.first = self.add(lambda outs: Quantize(IMAGES, outs, None), as_map(input_shape), grid)

    def add(self, make: Callable[[tuple[str, ...]], Step], shape: tuple[int, ...], grid: Grid | None) -> str:
        name = f"v{len(self.shapes)}"
        if grid is not None:
            self.grids[name] = grid
        self.shapes[name] = shape
        self.steps.append(make((name,)))
        return name

    def conv(
        self, x: str, out: int, kernel: int = 1, grid: Grid | None = BYTES, activation: str | None = None,
        residual: str | None = None, groups: int = 1,
    ) -> str:  # fmt: skip
        """Of the same size as x."""
        channels, *sides = self.shapes[x]
        weight = torch.randint(-8, 8, (out, channels // groups, kernel, kernel), generator=self.random).to(torch.int8)
        mult = torch.rand(out, generator=self.random) * 0.02 / kernel
        bias = torch.randn(out, generator=self.random)
        half = (kernel // 2, kernel // 2)
        return self.add(
            lambda outs: Layer(
                x, outs, activation, f"conv{len(self.steps)}", weight, 4, mult, bias, residual, padding=half,
                groups=groups,
            ),
            (out, *sides), grid,
        )  # fmt: skip

    def linear(self, x: str, out: int, grid: Grid | None = None) -> str:
        size = 1
        for side in self.shapes[x]:
            size *= side
        weight = torch.randint(-8, 8, (out, size), generator=self.random).to(torch.int8)
        constants = torch.rand(out, generator=self.random) * 0.01, torch.randn(out, generator=self.random)
        name = f"linear{len(self.steps)}"
        return self.add(lambda outs: Layer(x, outs, None, name, weight, 4, *constants, None), (out,), grid)

    def rescale(self, x: str, grid: Grid | None = BYTES, activation: str | None = None, slope: bool = False) -> str:
        channels = self.shapes[x][0]
        norm = [torch.randn(channels, generator=self.random) for _ in range(3)]
        slopes = torch.randn(channels, generator=self.random) if slope else None
        return self.add(lambda outs: Rescale(x, outs, activation, *norm, slopes), self.shapes[x], grid)

    def table(self, x: str, function: Any = torch.nn.functional.silu, grid: Grid | None = BYTES) -> str:
        own = self.grids[x]
        values = function((torch.arange(own.quant_min, own.quant_max + 1) - own.zero_point) * own.scale)
        return self.add(lambda outs: Table(x, outs, None, values.float()), self.shapes[x], grid)

    def plus(self, x: str, other: str, grid: Grid | None = BYTES) -> str:
        return self.add(lambda outs: Add(x, outs, "relu", other), self.shapes[x], grid)

    def times(self, x: str, other: str, grid: Grid | None = BYTES) -> str:
        scale = float(torch.tensor(self.grids[x].scale) * torch.tensor(self.grids[other].scale))
        return self.add(lambda outs: Multiply(x, outs, None, other, scale), self.shapes[x], grid)

    def mean(self, x: str, grid: Grid | None = BYTES) -> str:
        return self.add(lambda outs: AveragePool(x, outs, None), (self.shapes[x][0], 1, 1), grid)

    def largest(self, x: str) -> str:
        """3 x 3, of the same size as x."""
        return self.add(
            lambda outs: MaxPool(x, outs, None, (3, 3), (1, 1), (1, 1)), self.shapes[x], self.grids[x]
        )  # fmt: skip

    def double(self, x: str, grid: Grid = BYTES) -> str:
        """Twice as high and wide, bilinear."""
        channels, *sides = self.shapes[x]
        axes = []
        for side in sides:
            place = ((torch.arange(2 * side) + 0.5) / 2 - 0.5).clamp(0, side - 1)
            low = place.floor().to(torch.int32)
            axes += [torch.stack([low, (low + 1).clamp(max=side - 1)]), place - low]
        shape = (channels, *(2 * side for side in sides))
        return self.add(lambda outs: Resize(x, outs, None, *axes), shape, grid)

    def move(self, names: list[str], shape: tuple[int, ...], **places: Any) -> str:
        shape = as_map(shape)
        for key in places.keys() - {"fill"}:
            places[key] = torch.tensor(places[key], dtype=torch.int32)
        return self.add(
            lambda outs: Move(names[0], outs, None, shape, tuple(names[1:]), **places), shape, self.grids[names[0]]
        )

    def cat(self, *names: str) -> str:
        channels = sum(self.shapes[name][0] for name in names)
        return self.move(list(names), (channels, *self.shapes[names[0]][1:]))

    def cut(self, x: str, first: int, count: int) -> str:
        return self.move([x], (count, *self.shapes[x][1:]), channels=list(range(first, first + count)))

    def shuffle(self, x: str, groups: int = 2) -> str:
        channels = self.shapes[x][0]
        order = torch.arange(channels).view(groups, -1).T.flatten().tolist()
        return self.move([x], self.shapes[x], channels=order)

    def graph(self, *outputs: str | Output, structure: Any = 0, **more: Any) -> IntegerGraph:
        made = tuple(Output(item, self.shapes[item]) if isinstance(item, str) else item for item in outputs)
        return IntegerGraph(self.input_shape, dict(self.grids), tuple(self.steps), made, structure=structure, **more)


def residual_network(shape: tuple[int, int, int] = (3, 9, 11), **more: Any) -> IntegerGraph:
    """Convolutions, a batch norm of its own, a residual, a depthwise convolution, a pool, a linear layer."""
    b = Builder(shape)
    stem = b.conv(b.first, 20, 3, SIGNED)
    inner = b.conv(b.rescale(stem, activation="relu"), 20, 3, activation="relu6")
    stream = b.conv(b.conv(inner, 20, 3, groups=20), 20, 1, SIGNED, residual=stem)
    return b.graph(b.linear(b.mean(b.rescale(stream)), 10), **more)


def squeeze_network() -> IntegerGraph:
    """A gate per channel, SiLU, and sums and products with values that are there already."""
    b = Builder((5, 8, 7))
    x = b.table(b.conv(b.first, 24, 3, SIGNED))
    gate = b.conv(b.table(b.conv(b.mean(x), 6, 1, SIGNED)), 24, 1, Grid(1 / 256, 0, 0, 255), "hardsigmoid")
    x = b.times(x, gate, SIGNED)
    y = b.conv(x, 24, 3, SIGNED, "hardswish")
    y = b.times(b.plus(y, x, SIGNED), b.conv(x, 24, 1, SIGNED, "leaky_relu(0.1)"), SIGNED)
    y = b.plus(b.conv(y, 24, 1, SIGNED, "hardtanh(-1.5,2.5)"), gate)
    return b.graph(b.linear(b.rescale(y, slope=True), 7))


def dense_network() -> IntegerGraph:
    """Every layer reads all maps before it, in one plane: no byte is copied."""
    b = Builder((3, 7, 6))
    features = [b.conv(b.first, 21, 3)]
    for out in (5, 12, 16):
        joined = b.cat(*features) if len(features) > 1 else features[0]
        features.append(b.conv(b.rescale(joined, activation="relu"), out, 3))
    return b.graph(b.linear(b.mean(b.cat(*features)), 4))


def inception_network() -> IntegerGraph:
    """Branches of odd widths, one of them a max pool, read by layers with padding, all of them and one alone."""
    b = Builder((3, 6, 9))
    x = b.conv(b.first, 17, 3)
    joined = b.cat(b.conv(x, 3), b.largest(x), b.conv(b.conv(x, 7), 5, 3), b.table(b.conv(x, 18, grid=SIGNED)))
    wide, part = b.conv(joined, 9, 5), b.cut(joined, 3, 17)
    return b.graph(b.linear(b.conv(part, 9, 3, residual=wide), 4))


def shuffle_network() -> IntegerGraph:
    """Halves of the channels, one of them through layers, shuffled."""
    b = Builder((4, 5, 6))
    x = b.conv(b.first, 36, 3)
    for _ in range(2):
        kept, other = b.cut(x, 0, 18), b.cut(x, 18, 18)
        x = b.shuffle(b.cat(kept, b.conv(b.conv(other, 18, 3, groups=18), 18)))
    return b.graph(b.linear(b.shuffle(x, 3), 4))


def pyramid_network() -> IntegerGraph:
    """A map resized and joined with a larger one; maps and vectors as results."""
    b = Builder((3, 8, 10))
    large = b.conv(b.first, 12, 3)
    pixels = torch.arange(80).view(8, 10)[::2, ::2].flatten().tolist()
    small = b.conv(b.move([large], (12, 4, 5), pixels=pixels), 14, 3)
    joined = b.conv(b.cat(large, b.double(small)), 19, 3)
    mask, score = b.conv(joined, 3, grid=None), b.linear(b.mean(joined), 6)
    turned = torch.arange(240).view(3, 8, 10).permute(1, 2, 0).flatten()
    outputs = Output(mask, (3, 8, 10), None, "softmax", 1), score, Output(mask, (8, 30), turned, "log_softmax", 2)
    return b.graph(*outputs, structure={"masks": [0, 2], "score": 1})


def joined_twice_network() -> IntegerGraph:
    """What cannot lie in two planes is copied: one map in two joins, one twice in a join, halves joined again."""
    b = Builder((3, 5, 5))
    x, y, z = b.conv(b.first, 9, 3), b.conv(b.first, 11), b.conv(b.first, 9)
    one, other = b.cat(x, y), b.cat(y, z)
    again = b.cat(b.cut(one, 0, 9), b.cut(one, 9, 11))  # is `one`
    twice, turned = b.cat(z, z), b.cat(b.cut(one, 9, 11), b.cut(one, 0, 9))
    joined = b.cat(one, other, again, twice, turned, b.cat(x))
    return b.graph(b.linear(b.conv(joined, 8, 3), 4))


def anywhere_network() -> IntegerGraph:
    """Padding with any value, a crop, a transposition, depth to space."""
    b = Builder((4, 6, 6))
    x = b.conv(b.first, 8, 3, SIGNED)
    inside = torch.full((8, 9), -1)
    inside[1:7, 2:8] = torch.arange(36).view(6, 6)
    padded = b.move([x], (8, 8, 9), pixels=inside.flatten().tolist(), fill=-128)
    source = torch.arange(8 * 36).view(8, 6, 6)
    turned = b.move([x], (6, 6, 8), index=source.permute(1, 2, 0).flatten().tolist())
    deep = source.view(2, 2, 2, 6, 6).permute(0, 3, 1, 4, 2).reshape(2, 12, 12)
    space = b.move([x, turned], (2, 12, 12), index=deep.flatten().tolist())
    parts = [b.mean(b.conv(part, 5, 3), SIGNED) for part in (padded, turned, space)]
    return b.graph(b.linear(b.cat(*parts), 4))


def vector_network() -> IntegerGraph:
    """Images that are vectors; vectors joined and cut."""
    b = Builder((50,))
    x = b.linear(b.first, 30, SIGNED)
    y = b.table(x, torch.tanh, SIGNED)
    return b.graph(b.linear(b.cat(b.cut(y, 3, 13), b.rescale(x, SIGNED)), 6))


def unread_network() -> IntegerGraph:
    """A sum that nobody reads, chained to a layer that others read."""
    b = Builder((3, 7, 9))
    stem = b.conv(b.first, 20, 3)
    inner = b.conv(stem, 20, 1)
    b.plus(inner, stem)
    return b.graph(b.linear(b.mean(b.conv(inner, 12, 1)), 5))


GRAPHS: dict[str, Callable[[], IntegerGraph]] = {
    made.__name__.removesuffix("_network"): made
    for made in (
        residual_network, squeeze_network, dense_network, inception_network, shuffle_network, pyramid_network,
        joined_twice_network, anywhere_network, vector_network, unread_network,
    )
}  # fmt: skip
