"""The integer graph as a sequence of `dfq_kernels`' operators: with the reference backend the oracle, with Triton how a
GPU runs it, captured in a CUDA graph for each batch size."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dfq.engine.check import Shape, check_graph
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
from dfq.engine.memory import fuse
from dfq.engine.moves import Placement
from dfq.running.execution import Execution
from dfq_kernels import (
    Grid,
    PackedWeight,
    QuantizedTensor,
    Requantize,
    int_conv2d,
    int_pool,
    int_resize,
    pack_weight,
    quantize,
    requantize,
)

Values = dict[str, QuantizedTensor]
Reals = dict[str, Tensor]
ALIGNED = 16  # bytes: what kernels are specialised for
MOST_CAPTURED = 16  # batch sizes; calls of others run as they are
_FOLLOWED = (Layer, Rescale, Table, Add, Multiply)  # steps whose operators take what follows them along


class OperatorNetwork:
    """A network, ready to run; several threads may call it at once. Every value is a map; a vector is one pixel.

    Args:
        graph: an integer graph.
        device: where its constants go and its operators run.
        backend: of the operators.
        execution: how a call's operators are run: captured, where it captures.

    Raises:
        GraphError: a graph that is no network.
    """

    def __init__(self, graph: IntegerGraph, device: torch.device, backend: str, execution: Execution) -> None:
        self.graph, self.shapes, self.execution = graph, check_graph(graph), execution
        plain = backend == "reference"
        self.settings: dict[str, Any] = {"backend": backend, "packed": not plain}
        self.calls = [(step, None) for step in graph.steps] if plain else _calls(graph, self.shapes)
        self.lock, self.sizes = threading.Lock(), set[int]()
        moves = [step for step in graph.steps if isinstance(step, Move)]
        self._placements = {step.outs: Placement(step, graph.grids[step.outs[0]], device) for step in moves}
        constants = [
            getattr(step, key) for step in graph.steps if step not in moves for key in step.tensors if key != "weight"
        ]
        self._moved = {id(value): value.to(device) for value in constants if value is not None}
        layers = [step for step in graph.steps if isinstance(step, Layer)]
        self._weights = {step.outs: self._packed(step).to(device) for step in layers}

    def __call__(self, images: Tensor) -> Reals:
        """Every real value by its name, fp32 `[N, C, H, W]`, or `[N, C]` of a vector.

        Args:
            images: fp32 `[N, *input_shape]` on the device.

        Raises:
            ValueError: images that hold NaN.
        """
        images = images.contiguous()
        images = images.clone() if images.data_ptr() % ALIGNED else images  # else another kernel, unknown to a graph
        with self.lock, torch.no_grad():
            if len(images) in self.sizes or len(self.sizes) < MOST_CAPTURED:
                self.sizes.add(len(images))
                reals, nan = self.execution.step(len(images), self._reals, images)
            else:
                reals, nan = self._reals(images)
            if bool(nan):
                raise ValueError("engine: images must be numbers, got NaN")
            return reals

    def values(self, images: Tensor) -> dict[str, Tensor]:
        """Every value of the network: int64 integers, and real numbers."""
        values, reals = self._run(images)
        return {name: value.integers() for name, value in values.items()} | reals

    def _reals(self, images: Tensor) -> tuple[Reals, Tensor]:
        return self._run(images)[1], images.isnan().any()

    def _run(self, images: Tensor) -> tuple[Values, Reals]:
        images = images.reshape(len(images), *as_map(self.graph.input_shape))
        values: Values = {}
        reals: Reals = {}
        for step, following in self.calls:
            if isinstance(step, Quantize):
                for out in step.outs:
                    grid = self.graph.grids[out]
                    values[out] = quantize(images, grid, activation=step.activation, check_nan=False, **self.settings)
                continue
            then = None if following is None else self._requantize(following)
            results = _OPERATORS[type(step)](self, step, values, then)
            if isinstance(results, Tensor):
                name = step.outs[0]
                reals[name] = results.reshape(len(images), *self.shapes[name])
                continue
            names = step.outs + (() if following is None else following.outs)
            values |= dict(zip(names, results, strict=True))
        return values, reals

    def _requantize(self, step: Rescale | Table) -> Requantize:
        return Requantize(self.grids(step), activation=step.activation, **self.constants(step))

    def grids(self, step: Step) -> tuple[Grid, ...]:
        """Of a step's results; none of real numbers."""
        return tuple(self.graph.grids[out] for out in step.outs if out in self.graph.grids)

    def constants(self, step: Rescale | Table) -> dict[str, Tensor | None]:
        """On the device, as `requantize` and `Requantize` name them."""
        if isinstance(step, Table):
            return {"table": self._constant(step.values)}
        return {name: self._constant(getattr(step, name)) for name in step.tensors}

    def _constant(self, value: Tensor | None) -> Tensor | None:
        """A step's tensor on the device."""
        return None if value is None else self._moved[id(value)]

    def _packed(self, step: Layer) -> PackedWeight:
        """In as few bits as its sums allow."""
        packed = pack_weight(self._window(step), step.weight_bits)
        fits = packed.bound(self.graph.grids[step.x]) < 2**31
        return packed if fits else pack_weight(self._window(step), 8)

    def _window(self, step: Layer) -> Tensor:
        """A linear layer's weight is a window as large as the map."""
        return step.weight if step.weight.dim() == 4 else step.weight.reshape(-1, *as_map(self.shapes[step.x]))

    def layer(self, step: Layer, values: Values, then: Requantize | None) -> Any:
        residual = None if step.residual is None else values[step.residual]
        return int_conv2d(
            values[step.x], self._weights[step.outs], self._moved[id(step.mult)], self._moved[id(step.bias)],
            self.grids(step), stride=step.stride, padding=step.padding, dilation=step.dilation, groups=step.groups,
            residual=residual, activation=step.activation, then=then, **self.settings,
        )  # fmt: skip

    def rescale(self, step: Rescale | Table, values: Values, then: Requantize | None) -> Any:
        return self._requantized(step, values, then, **self.constants(step))

    def add(self, step: Add, values: Values, then: Requantize | None) -> Any:
        return self._requantized(step, values, then, other=values[step.other])

    def multiply(self, step: Multiply, values: Values, then: Requantize | None) -> Any:
        return self._requantized(step, values, then, other=values[step.other], product_scale=step.scale)

    def _requantized(self, step: Step, values: Values, then: Requantize | None, **keywords: Any) -> Any:
        return requantize(
            values[step.x], self.grids(step), activation=step.activation, then=then, **keywords, **self.settings
        )

    def average_pool(self, step: AveragePool, values: Values, _: None) -> Any:
        window: dict[str, Any] = {"output_size": step.output}
        if step.kernel is not None:
            window = {
                "kernel_size": step.kernel, "stride": step.stride, "padding": step.padding, "ceil_mode": step.ceil_mode,
                "count_include_pad": step.count_include_pad, "divisor_override": step.divisor or None,
            }  # fmt: skip
        return int_pool(values[step.x], self.grids(step), activation=step.activation, **window, **self.settings)

    def max_pool(self, step: MaxPool, values: Values, _: None) -> Any:
        window: dict[str, Any] = {"output_size": step.output}
        if step.kernel is not None:
            window = {
                "kernel_size": step.kernel, "stride": step.stride, "padding": step.padding, "dilation": step.dilation,
                "ceil_mode": step.ceil_mode,
            }  # fmt: skip
        return int_pool(values[step.x], mode="max", **window, **self.settings)

    def move(self, step: Move, values: Values, _: None) -> Any:
        return [self._placements[step.outs]([values[name] for name in (step.x, *step.others)], self.settings["packed"])]

    def resize(self, step: Resize, values: Values, _: None) -> Any:
        places = {name: self._moved[id(getattr(step, name))] for name in step.tensors}
        return int_resize(
            values[step.x], self.grids(step), activation=step.activation, check_places=False, **places, **self.settings
        )


_OPERATORS: dict[type[Step], Callable[..., Any]] = {
    Layer: OperatorNetwork.layer, Rescale: OperatorNetwork.rescale, Table: OperatorNetwork.rescale,
    Add: OperatorNetwork.add, Multiply: OperatorNetwork.multiply, AveragePool: OperatorNetwork.average_pool,
    MaxPool: OperatorNetwork.max_pool, Move: OperatorNetwork.move, Resize: OperatorNetwork.resize,
}  # fmt: skip


def _calls(graph: IntegerGraph, shapes: dict[str, Shape]) -> list[tuple[Step, Rescale | Table | None]]:
    """The steps in their order, and with each the step that its operator computes from its first result."""
    calls: list[tuple[Step, Rescale | Table | None]] = []
    for group in fuse(graph, shapes):
        follows, first = isinstance(group.step, _FOLLOWED), group.step.outs[0]
        taken = next(
            (one for one in group.chained if follows and isinstance(one, (Rescale, Table)) and one.x == first), None
        )
        calls.append((group.step, taken))
        calls += [(other, None) for other in group.chained if other is not taken]
    return calls
