"""The integer graph as a program of the native module: one call runs the whole network. csrc/cpu/program.h."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dfq.engine.check import Shape, check_graph
from dfq.engine.graph import (
    ACTIVATIONS,
    Add,
    AveragePool,
    IntegerGraph,
    Layer,
    MaxPool,
    Quantize,
    Rescale,
    Step,
    windows,
)  # fmt: skip
from dfq.engine.memory import Group, Place, fuse, plan_memory
from dfq_kernels.extension import native

LANES = 16  # channels that kernels read constants of at once
_KINDS: dict[type[Step], int] = {Quantize: 0, Layer: 1, Rescale: 2, Add: 3, AveragePool: 4, MaxPool: 5}


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
        program.planes = [self._plane(name, place) for name, place in self.places.items()]
        program.steps = [self._group(group) for group in groups]
        program.arena_bytes, program.classes = arena, graph.num_classes
        program.image_channels, program.image_height, program.image_width = graph.input_shape
        self.runner = native().Runner(program)

    def __call__(self, images: Tensor) -> Tensor:
        """Logits `[N, num_classes]` of images `[N, C, H, W]`, both fp32 on the CPU."""
        images = images.float().contiguous()
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

    def _plane(self, name: str, place: Place) -> Any:
        grid, plane = self.graph.grids[name], native().Plane()
        plane.offset, plane.height, plane.width = place.offset, place.height, place.width
        plane.channels, plane.stride = place.channels, place.stride
        plane.frame_y, plane.frame_x = place.frame
        plane.scale, plane.inverse = grid.scale, float(1 / torch.tensor(grid.scale))
        plane.zero_point, plane.quant_min, plane.quant_max = grid.zero_point, grid.quant_min, grid.quant_max
        plane.shift = 128 if grid.signed else 0
        return plane

    def _group(self, group: Group) -> Any:
        made = self._step(group.step)
        made.chained = [self._step(step) for step in group.chained]
        return made

    def _step(self, step: Step) -> Any:
        made = native().Step()
        made.kind, made.activation = _KINDS[type(step)], ACTIVATIONS.index(step.activation)
        made.x = self.index.get(step.x, -1)
        made.outs = [self.index[out] for out in step.outs if out in self.index]
        channels, *size = self.shapes[step.outs[0]]
        made.out_channels, (made.out_height, made.out_width) = channels, size or (1, 1)
        if (fill := _FILL.get(type(step))) is not None:
            fill(made, step, self)
        return made


def _padded(values: Tensor) -> list[float]:
    """With room for a whole vector from any channel on: groups begin where they like."""
    return torch.nn.functional.pad(values, (0, LANES)).tolist()


def _layer(made: Any, step: Layer, network: NativeNetwork) -> None:
    place, weight = network.places[step.x], step.weight
    if weight.dim() == 2:  # a window as large as the map
        weight = weight.reshape(len(weight), place.channels, place.height, place.width)
    weight = weight.permute(0, 2, 3, 1).contiguous()
    made.set_weight(weight.data_ptr(), weight.numel())
    made.kernel_y, made.kernel_x = weight.shape[1:3]
    made.mult, made.bias, made.groups = _padded(step.mult), _padded(step.bias), step.groups
    made.other = -1 if step.residual is None else network.index[step.residual]
    _window(made, step)


def _window(made: Any, step: Layer | AveragePool | MaxPool) -> None:
    (made.stride_y, made.stride_x), (made.pad_y, made.pad_x) = step.stride, step.padding
    if not isinstance(step, AveragePool):
        made.dilation_y, made.dilation_x = step.dilation


def _rescale(made: Any, step: Rescale, network: NativeNetwork) -> None:
    if step.mean is not None and step.mult is not None and step.bias is not None:
        made.mean, made.mult, made.bias = _padded(step.mean), _padded(step.mult), _padded(step.bias)


def _add(made: Any, step: Add, network: NativeNetwork) -> None:
    made.other = network.index[step.other]


def _average_pool(made: Any, step: AveragePool, network: NativeNetwork) -> None:
    shape: Shape = network.shapes[step.x]
    spans = []
    for axis, parts in enumerate((made.out_height, made.out_width)):
        if step.kernel is None:
            spans.append(windows(shape[axis + 1], parts))
        else:
            begins = [index * step.stride[axis] - step.padding[axis] for index in range(parts)]
            spans.append([(begin, begin + step.kernel[axis]) for begin in begins])
    made.windows = [edge for axis in spans for span in axis for edge in span]
    scale = torch.tensor(network.graph.grids[step.x].scale)
    counts = [float((bottom - top) * (right - left)) for top, bottom in spans[0] for left, right in spans[1]]
    made.mult = (scale / torch.tensor(counts)).tolist()


def _max_pool(made: Any, step: MaxPool, network: NativeNetwork) -> None:
    made.kernel_y, made.kernel_x = step.kernel
    _window(made, step)


_FILL: dict[type[Step], Callable[..., None]] = {
    Layer: _layer, Rescale: _rescale, Add: _add, AveragePool: _average_pool, MaxPool: _max_pool,
}  # fmt: skip
