"""The integer graph as a program of the native module: one call runs the whole network. csrc/cpu/program.h."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dfq.engine.check import check_graph
from dfq.engine.graph import Add, AveragePool, IntegerGraph, Layer, MaxPool, Quantize, Rescale, Step
from dfq.engine.memory import Group, Place, fuse, plan_memory
from dfq_kernels.extension import native
from dfq_kernels.int_pool.schema import spans
from dfq_kernels.programs import (
    ADD,
    AVERAGE_POOL,
    CONVOLVE,
    MAX_POOL,
    QUANTIZE,
    RESCALE,
    make_plane,
    make_step,
    set_average,
    set_layer,
    set_norm,
    set_window,
)

_KINDS: dict[type[Step], int] = {
    Quantize: QUANTIZE, Layer: CONVOLVE, Rescale: RESCALE, Add: ADD, AveragePool: AVERAGE_POOL, MaxPool: MAX_POOL,
}  # fmt: skip


class NativeNetwork:
    """A network, ready to run on the CPU; several threads may call it at once.

    Args:
        graph: checked by `check_graph`.
        keep: whether every value keeps its memory, for `values`.
    """

    def __init__(self, graph: IntegerGraph, *, keep: bool = False) -> None:
        self.graph, self.shapes = graph, check_graph(graph)
        groups = fuse(graph)
        self.places, arena = plan_memory(graph, groups, self.shapes, reuse=not keep)
        self.index = {name: position for position, name in enumerate(self.places)}
        program = native().Program()
        program.planes = [
            make_plane(graph.grids[name], place.channels, place.height, place.width, place.frame, place.offset)
            for name, place in self.places.items()
        ]
        program.steps = [self._group(group) for group in groups]
        program.arena_bytes, program.classes = arena, graph.num_classes
        program.image_channels, program.image_height, program.image_width = graph.input_shape
        self.runner = native().Runner(program)

    def __call__(self, images: Tensor) -> Tensor:
        """Logits `[N, num_classes]` of images `[N, C, H, W]`, both fp32 on the CPU."""
        images = images.contiguous()
        logits = torch.empty(len(images), self.graph.num_classes)
        self.runner.run(images.data_ptr(), len(images), logits.data_ptr(), torch.get_num_threads())
        return logits

    def values(self, image: Tensor) -> dict[str, Tensor]:
        """Every integer value of one image `[1, C, H, W]`, as int64; of a network that keeps them."""
        image, logits = image.float().contiguous(), torch.empty(1, self.graph.num_classes)
        arena = torch.frombuffer(
            bytearray(self.runner.trace(image.data_ptr(), logits.data_ptr())), dtype=torch.uint8
        )  # fmt: skip
        found = {name: self._read(name, place, arena) for name, place in self.places.items()}
        return found | {self.graph.output: logits}

    def _read(self, name: str, place: Place, arena: Tensor) -> Tensor:
        rows, columns = place.height + 2 * place.frame[0], place.width + 2 * place.frame[1]
        whole = arena[place.offset : place.offset + place.size].view(rows, columns, place.stride)
        top, left = place.frame
        inside = whole[top : top + place.height, left : left + place.width, : place.channels].long()
        return (inside - 128 * self.graph.grids[name].signed).permute(2, 0, 1).reshape(1, *self.shapes[name])

    def _group(self, group: Group) -> Any:
        made = self._step(group.step)
        made.chained = [self._step(step) for step in group.chained]
        return made

    def _step(self, step: Step) -> Any:
        shape = (*self.shapes[step.outs[0]], 1, 1)[:3]
        outs = [self.index[out] for out in step.outs if out in self.index]
        made = make_step(_KINDS[type(step)], step.activation, shape, self.index.get(step.x, -1), outs)
        _FILL[type(step)](made, step, self)
        return made


def _quantize(made: Any, step: Quantize, network: NativeNetwork) -> None:
    """Nothing but what every step has."""


def _layer(made: Any, step: Layer, network: NativeNetwork) -> None:
    place, weight = network.places[step.x], step.weight
    if weight.dim() == 2:  # a window as large as the map
        weight = weight.reshape(len(weight), place.channels, place.height, place.width)
    set_layer(made, weight, step.mult, step.bias, step.groups)
    set_window(made, step.stride, step.padding, step.dilation)
    made.other = -1 if step.residual is None else network.index[step.residual]


def _rescale(made: Any, step: Rescale, network: NativeNetwork) -> None:
    set_norm(made, [vector for vector in (step.mean, step.mult, step.bias) if vector is not None])


def _add(made: Any, step: Add, network: NativeNetwork) -> None:
    made.other = network.index[step.other]


def _average_pool(made: Any, step: AveragePool, network: NativeNetwork) -> None:
    sides, outs = network.shapes[step.x][1:], (made.out_height, made.out_width)
    kernel, adaptive = ((1, 1), step.output) if step.kernel is None else (step.kernel, ())
    set_window(made, step.stride, step.padding)
    scale = network.graph.grids[step.x].scale
    set_average(made, scale, spans(sides, outs, kernel, step.stride, step.padding, adaptive))


def _max_pool(made: Any, step: MaxPool, network: NativeNetwork) -> None:
    made.kernel_y, made.kernel_x = step.kernel
    set_window(made, step.stride, step.padding, step.dilation)


_FILL: dict[type[Step], Callable[..., None]] = {
    Quantize: _quantize, Layer: _layer, Rescale: _rescale, Add: _add, AveragePool: _average_pool, MaxPool: _max_pool,
}  # fmt: skip
