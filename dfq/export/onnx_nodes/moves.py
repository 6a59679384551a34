"""Moves of integers in ONNX: slices and concatenations, padding, axes in another order; else an index.

All work on uint8, which nothing rounds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dfq.engine.graph import Move, as_map
from dfq.export.onnx_nodes.values import Writer

MOST_RUNS = 8  # of channels that are slices and a concatenation, before it is an index
Run = tuple[int, int, int]  # source, first and last channel


def move(writer: Writer, step: Move) -> None:
    """The value itself."""
    out, sources = step.outs[0], (step.x, *step.others)
    shapes = [as_map(writer.shapes[name]) for name in sources]
    maps = [writer.integers(name, shape) for name, shape in zip(sources, shapes, strict=True)]
    places = _Places(writer, step, out)
    if len(maps) > 1 and _mixed(step, [shape[0] for shape in shapes]):  # as after a channel shuffle: first joined
        total = sum(shape[0] for shape in shapes)
        maps, shapes = [places.joined(maps, f"{out}.whole")], [(total, *shapes[0][1:])]
    if len(maps) == 1 and _reordered(writer, step, maps[0], shapes[0], out):
        return
    if step.index is not None:
        flat = [writer.reshaped(name, (math.prod(shape),), f"{out}.flat.{index}")
                for index, (name, shape) in enumerate(zip(maps, shapes, strict=True))]  # fmt: skip
        found = places.indexed(places.joined(flat, f"{out}.joined"), step.index, 1, 1, f"{out}.found")
        writer.reshaped(found, step.shape, out)
        return
    counts, sides = [shape[0] for shape in shapes], shapes[0][1:]
    if step.pixels is None or torch.equal(step.pixels.long(), torch.arange(math.prod(sides))):
        places.of_channels(maps, counts, out)
    elif step.channels is None and len(maps) == 1:
        places.of_pixels(maps[0], sides, step.pixels)
    else:
        places.of_pixels(places.of_channels(maps, counts, f"{out}.channels"), sides, step.pixels)


class _Places:
    def __init__(self, writer: Writer, step: Move, out: str) -> None:
        self.writer, self.step, self.out = writer, step, out
        self.fill = step.fill - writer.lowest[out]

    def joined(self, names: list[str], out: str) -> str:
        return names[0] if len(names) == 1 else self.writer.node("Concat", names, out, axis=1)

    def of_channels(self, maps: list[str], counts: list[int], out: str) -> str:
        """Every result channel's map, of maps whose channels are counted one after the other."""
        channels = torch.arange(sum(counts)) if self.step.channels is None else self.step.channels
        found = _progression(channels)
        if len(maps) == 1 and found is not None:
            return self.sliced(maps[0], 1, *found, out)
        runs = _runs(channels, counts)
        if runs is None or len(runs) > MOST_RUNS:
            return self.indexed(self.joined(maps, f"{out}.joined"), channels, 1, 3, out)
        parts = [
            maps[source] if (first, last) == (0, counts[source]) and len(runs) > 1
            else self.sliced(maps[source], 1, first, last, 1, out if len(runs) == 1 else f"{out}.part.{index}")
            for index, (source, first, last) in enumerate(runs)
        ]  # fmt: skip
        return self.joined(parts, out)

    def sliced(self, name: str, axis: int, first: int, last: int, step: int, out: str) -> str:
        limits = {"first": first, "last": last, "axis": axis, "step": step}
        names = [self.writer.numbers(f"{out}.{key}", value) for key, value in limits.items()]
        return self.writer.node("Slice", [name, *names], out)

    def indexed(self, name: str, places: Tensor, axis: int, axes: int, out: str) -> str:
        """Places along an axis, of `axes` after the batch; the fill where there is none."""
        absent = places < 0
        index = self.writer.constant(f"{out}.places", places.clamp(min=0).long())
        if not bool(absent.any()):
            return self.writer.node("Gather", [name, index], out, axis=axis)
        found = self.writer.node("Gather", [name, index], f"{out}.gathered", axis=axis)
        mask = self.writer.constant(f"{out}.absent", absent.view(-1, *[1] * (axes - axis)))
        return self.writer.node("Where", [mask, self._filled(), found], out)

    def _filled(self) -> str:
        return self.writer.constant(f"{self.out}.fill", np.array(self.fill, np.uint8))

    def of_pixels(self, name: str, sides: Sequence[int], pixels: Tensor) -> None:
        """The result, of maps: rows and columns apart where they are, else all pixels in a row."""
        apart = _rows_and_columns(pixels, sides, self.step.shape[1:])
        if apart is None:
            flat = self.writer.reshaped(name, (self.step.shape[0], math.prod(sides)), f"{self.out}.pixels")
            found = self.indexed(flat, pixels, 2, 2, f"{self.out}.found")
            self.writer.reshaped(found, self.step.shape, self.out)
            return
        (rows, down), (columns, across) = (_without_ends(places) for places in apart)
        pads = (0, 0, down[0], across[0], 0, 0, down[1], across[1])
        changed = [(axis, places) for axis, places, side in ((2, rows, sides[0]), (3, columns, sides[1]))
                   if not torch.equal(places, torch.arange(side))]  # fmt: skip
        for index, (axis, places) in enumerate(changed, 1):
            last = index == len(changed) and not any(pads)
            name = self._along(name, axis, places, self.out if last else f"{self.out}.axis.{axis}")
        if any(pads):
            self.writer.node("Pad", [name, self.writer.numbers(f"{self.out}.pads", *pads), self._filled()], self.out)

    def _along(self, name: str, axis: int, places: Tensor, out: str) -> str:
        found = _progression(places)
        return self.indexed(name, places, axis, 3, out) if found is None else self.sliced(name, axis, *found, out)


def _mixed(step: Move, counts: list[int]) -> bool:
    """Whether a move takes channels from here and there of several sources, and not a few runs of neighbours."""
    if step.channels is None or step.index is not None or bool((step.channels < 0).any()):
        return False
    runs, found = _runs(step.channels, counts), _progression(step.channels)
    return runs is None or len(runs) > MOST_RUNS or (found is not None and found[2] > 1)


def _reordered(writer: Writer, step: Move, name: str, shape: tuple[int, ...], out: str) -> bool:
    """Writes a move that changes the order of axes, or of parts of axes, and nothing else: shuffles, transpositions."""
    index = step.index
    if index is None:
        channels = torch.arange(shape[0]) if step.channels is None else step.channels
        pixels = torch.arange(shape[1] * shape[2]) if step.pixels is None else step.pixels
        if bool((channels < 0).any()) or bool((pixels < 0).any()):
            return False
        index = (channels.long()[:, None] * (shape[1] * shape[2]) + pixels.long()).flatten()
    axes = _axes(index.long())
    if axes is None or math.prod(size for size, _ in axes) != math.prod(shape):
        return False
    order = sorted(range(len(axes)), key=lambda axis: -axes[axis][1])  # the source's axes, the outermost first
    if order == list(range(len(axes))):
        writer.reshaped(name, step.shape, out)
        return True
    apart = writer.reshaped(name, tuple(axes[axis][0] for axis in order), f"{out}.apart")
    turned = [0, *(1 + order.index(axis) for axis in range(len(axes)))]
    writer.reshaped(writer.node("Transpose", [apart], f"{out}.turned", perm=turned), step.shape, out)
    return True


def _axes(index: Tensor) -> list[tuple[int, int]] | None:
    """Sizes and strides of a view of 0, 1, 2, ... that reads `index`, the outermost first; None if there is none."""
    axes: list[tuple[int, int]] = []
    if int(index[0]) != 0:
        return None
    while len(index) > 1:
        stride = int(index[1])
        straight = index == torch.arange(len(index)) * stride
        size = len(index) if bool(straight.all()) else int(straight.int().argmin())
        if stride < 1 or len(index) % size or size == 1:
            return None
        rows = index.view(-1, size)
        if not torch.equal(rows, rows[:, :1] + torch.arange(size) * stride):
            return None
        axes.insert(0, (size, stride))
        index = rows[:, 0]
    reached = 1
    for size, stride in sorted(axes, key=lambda axis: axis[1]):  # every place once
        if stride != reached:
            return None
        reached *= size
    return axes


def _runs(channels: Tensor, counts: list[int]) -> list[Run] | None:
    """Neighbouring channels of one source at a time; None where one has none."""
    if bool((channels < 0).any()):
        return None
    starts = np.cumsum([0, *counts])
    runs: list[Run] = []
    for channel in channels.tolist():
        source = int(np.searchsorted(starts, channel, "right")) - 1
        place = channel - int(starts[source])
        if runs and runs[-1][0] == source and runs[-1][2] == place:
            runs[-1] = (source, runs[-1][1], place + 1)
        else:
            runs.append((source, place, place + 1))
    return runs


def _progression(places: Tensor) -> tuple[int, int, int] | None:
    """First, end and distance of places that follow one another at one distance."""
    first, end = int(places[0]), int(places[-1]) + 1
    distance = int(places[1]) - first if len(places) > 1 else 1
    if first < 0 or distance < 1 or not torch.equal(places.long(), first + distance * torch.arange(len(places))):
        return None
    return first, end, distance


def _without_ends(places: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """Places without those at both ends that hold nothing, and how many these are."""
    first, last = (places >= 0).nonzero().flatten()[[0, -1]].tolist()
    return places[first : last + 1], (first, len(places) - last - 1)


def _rows_and_columns(pixels: Tensor, sides: Sequence[int], out_sides: Sequence[int]) -> tuple[Tensor, Tensor] | None:
    """A row for every row and a column for every column of the result, -1 at its ends; None: they are not apart."""
    table = pixels.long().view(*out_sides)
    inside = table >= 0
    down, across = inside.any(1), inside.any(0)
    if not torch.equal(inside, down[:, None] & across) or not bool(inside.any()):
        return None
    row = torch.where(down, table.amax(1) // sides[1], -1)
    column = torch.where(across, table.amax(0) % sides[1], -1)
    if not torch.equal(table, torch.where(inside, row[:, None] * sides[1] + column, -1)):
        return None
    for there in (down, across):  # nothing missing in between
        first, last = there.nonzero().flatten()[[0, -1]].tolist()
        if not bool(there[first : last + 1].all()):
            return None
    return row, column
