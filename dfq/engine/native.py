"""The integer graph as a program of the native module: one call runs the whole network. csrc/cpu/program.h."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dfq.engine.check import check_graph
from dfq.engine.fusion import Group, fuse
from dfq.engine.graph import (
    Add,
    AveragePool,
    IntegerGraph,
    Layer,
    MaxPool,
    Move,
    Multiply,
    Quantize,
    Rescale,
    Resize,
    Step,
    Table,
    as_map,
)
from dfq.engine.memory import Place, plan_memory
from dfq.engine.pixels import pixel_values
from dfq.engine.shapes import pool_multipliers
from dfq_kernels import programs
from dfq_kernels.extension import native
from dfq_kernels.int_pool.schema import spans
from dfq_kernels.integers import Constants

_KINDS: dict[type[Step], int] = {
    Quantize: programs.QUANTIZE, Layer: programs.CONVOLVE, Rescale: programs.RESCALE, Add: programs.ADD,
    AveragePool: programs.AVERAGE_POOL, MaxPool: programs.MAX_POOL, Table: programs.TABLE, Multiply: programs.MULTIPLY,
    Move: programs.MOVE, Resize: programs.RESIZE,
}  # fmt: skip


class NativeNetwork:
    """A network, ready to run on the CPU; several threads may call it at once.

    Args:
        graph: checked by `check_graph`.
        keep: whether every value keeps its memory, for `values`.
    """

    def __init__(self, graph: IntegerGraph, *, keep: bool = False) -> None:
        self.graph, self.shapes = graph, check_graph(graph)
        groups = fuse(graph, self.shapes)
        self.places, arena = plan_memory(graph, groups, self.shapes, reuse=not keep)
        self.index = {name: position for position, name in enumerate(self.places)}
        self.reals = [out for group in groups for out in group.outs if out not in graph.grids]
        self.groups, self.arena = groups, arena
        self.runner = self.runner_of(groups)

    def runner_of(self, groups: list[Group]) -> Any:
        """A program of these groups alone, which find what they read where the others would have put it."""
        program = native().Program()
        program.planes = [self._plane(name, place) for name, place in self.places.items()]
        program.steps = [self._group(group) for group in groups]
        program.arena_bytes = self.arena
        program.image_channels, program.image_height, program.image_width = as_map(self.graph.input_shape)
        if self.graph.normalization is not None:
            program.pixel_values = pixel_values(self.graph.normalization).flatten().tolist()
        return native().Runner(program)

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Every real value, by its name, fp32: `[N, C, H, W]`, channels-last, or `[N, C]` where it is a vector.

        images: `[N, *input_shape]`, fp32 on the CPU, or uint8 where the graph says what pixels are.
        """
        images = images.contiguous()
        reals = self._reals(len(images))
        addresses = [real.data_ptr() for real in reals.values()]
        in_bytes = images.dtype == torch.uint8
        self.runner.run(images.data_ptr(), len(images), addresses, torch.get_num_threads(), in_bytes)
        return reals

    def values(self, image: Tensor) -> dict[str, Tensor]:
        """Every value of one image `[1, *input_shape]`, integers as int64; of a network that keeps them."""
        image, reals = image.float().contiguous(), self._reals(1)
        addresses = [real.data_ptr() for real in reals.values()]
        arena = torch.frombuffer(bytearray(self.runner.trace(image.data_ptr(), addresses)), dtype=torch.uint8)
        return {name: self._read(name, place, arena) for name, place in self.places.items()} | reals

    def _reals(self, count: int) -> dict[str, Tensor]:
        """Room for the real values of so many images."""
        made = {}
        for name in self.reals:
            shape = self.shapes[name]
            if len(shape) == 1:
                made[name] = torch.empty(count, *shape)
            else:
                channels, height, width = shape
                made[name] = torch.empty(count, height, width, channels).permute(0, 3, 1, 2)
        return made

    def _read(self, name: str, place: Place, arena: Tensor) -> Tensor:
        row = (place.width + 2 * place.frame[1]) * place.stride
        first = place.offset + place.frame[0] * row + place.frame[1] * place.stride
        sides = place.channels, place.height, place.width
        inside = arena.as_strided(sides, (1, row, place.stride), first).long()
        return (inside - programs.shift_of(self.graph.grids[name])).reshape(1, *self.shapes[name])

    def _plane(self, name: str, place: Place) -> Any:
        stride = 0 if place.root == name else place.stride
        sides = place.channels, place.height, place.width
        return programs.make_plane(self.graph.grids[name], *sides, place.frame, place.offset, stride, place.kept)

    def _group(self, group: Group) -> Any:
        made = self._step(group.step)
        made.chained = [self._step(step) for step in group.chained]
        return made

    def _step(self, step: Step) -> Any:
        shape = as_map(self.shapes[step.outs[0]])
        outs = [self.index[out] for out in step.outs if out in self.index]
        made = programs.make_step(_KINDS[type(step)], step.activation, shape, self.index.get(step.x, -1), outs)
        if not outs:
            made.real = self.reals.index(step.outs[0])
        _FILL[type(step)](made, step, self)
        return made


def _quantize(made: Any, step: Quantize, network: NativeNetwork) -> None:
    """Nothing but what every step has."""


def _layer(made: Any, step: Layer, network: NativeNetwork) -> None:
    place, weight = network.places[step.x], step.weight
    if weight.dim() == 2:  # a window as large as the map
        weight = weight.reshape(len(weight), place.channels, place.height, place.width)
    programs.set_layer(made, weight, step.mult, step.bias, step.groups)
    programs.set_window(made, step.stride, step.padding, step.dilation)
    made.other = -1 if step.residual is None else network.index[step.residual]


def _rescale(made: Any, step: Rescale, network: NativeNetwork) -> None:
    constants = Constants(step.mean, step.mult, step.bias, step.slope)
    programs.set_constants(made, constants, network.graph.grids[step.x])


def _table(made: Any, step: Table, network: NativeNetwork) -> None:
    programs.set_table(made, step.values, network.graph.grids[step.x])


def _add(made: Any, step: Add, network: NativeNetwork) -> None:
    made.other = network.index[step.other]


def _multiply(made: Any, step: Multiply, network: NativeNetwork) -> None:
    made.other, made.scale = network.index[step.other], step.scale


def _average_pool(made: Any, step: AveragePool, network: NativeNetwork) -> None:
    sides, counts = as_map(network.shapes[step.x])[1:], (made.out_height, made.out_width)
    kernel, adaptive = ((1, 1), step.output) if step.kernel is None else (step.kernel, ())
    factors = pool_multipliers(step, network.graph.grids[step.x].scale, sides, counts)
    programs.set_average(made, factors, spans(sides, counts, kernel, step.stride, step.padding, adaptive))


def _max_pool(made: Any, step: MaxPool, network: NativeNetwork) -> None:
    if step.kernel is None:
        sides, none = as_map(network.shapes[step.x])[1:], (1, 1)
        programs.set_windows(made, spans(sides, step.output, none, none, (0, 0), step.output))
        return
    made.kernel_y, made.kernel_x = step.kernel
    programs.set_window(made, step.stride, step.padding, step.dilation)


def _move(made: Any, step: Move, network: NativeNetwork) -> None:
    made.sources = [network.index[name] for name in (step.x, *step.others)]
    made.fill = step.fill + programs.shift_of(network.graph.grids[step.outs[0]])
    made.channels = [] if step.channels is None else step.channels.tolist()
    made.pixels = [] if step.pixels is None else step.pixels.tolist()
    if step.index is not None:
        index = step.index.contiguous()
        made.set_index(index.data_ptr(), index.numel())


def _resize(made: Any, step: Resize, network: NativeNetwork) -> None:
    scale = network.graph.grids[step.x].scale
    programs.set_resize(made, step.rows, step.row_weights, step.columns, step.column_weights, scale)


_FILL: dict[type[Step], Callable[..., None]] = {
    Quantize: _quantize, Layer: _layer, Rescale: _rescale, Table: _table, Add: _add, Multiply: _multiply,
    AveragePool: _average_pool, MaxPool: _max_pool, Move: _move, Resize: _resize,
}  # fmt: skip
