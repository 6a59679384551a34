"""The integer graph as a sequence of `dfq_kernels`' operators: with the reference backend the oracle, with Triton how a
GPU runs it, captured in a CUDA graph for each batch size."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dfq.engine.check import check_graph
from dfq.engine.graph import Add, AveragePool, IntegerGraph, Layer, MaxPool, Quantize, Rescale, Step
from dfq.engine.memory import fuse
from dfq.execution import Execution
from dfq_kernels import (
    Grid,
    PackedWeight,
    QuantizedTensor,
    Requantize,
    int_conv2d,
    int_pool,
    pack_weight,
    quantize,
    requantize,
)

Values = dict[str, QuantizedTensor]
ALIGNED = 16  # bytes: what kernels are specialised for
MOST_CAPTURED = 16  # batch sizes; calls of others run as they are
_FOLLOWED = (Layer, Rescale, Add)  # steps whose operators take what follows them along


class OperatorNetwork:
    """A network, ready to run; several threads may call it at once.

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
        self.calls = [(step, None) for step in graph.steps] if plain else _calls(graph)
        self.lock, self.sizes = threading.Lock(), set[int]()
        constants = [getattr(step, key) for step in graph.steps for key in step.tensors if key != "weight"]
        self._moved = {id(value): value.to(device) for value in constants if value is not None}
        layers = [step for step in graph.steps if isinstance(step, Layer)]
        self._weights = {step.outs: self._packed(step).to(device) for step in layers}

    def __call__(self, images: Tensor) -> Tensor:
        """Logits `[N, num_classes]` of images `[N, C, H, W]`, both fp32 on the device.

        Raises:
            ValueError: images that hold NaN.
        """
        images = images.contiguous()
        images = images.clone() if images.data_ptr() % ALIGNED else images  # else another kernel, unknown to a graph
        with self.lock, torch.no_grad():
            if len(images) in self.sizes or len(self.sizes) < MOST_CAPTURED:
                self.sizes.add(len(images))
                logits, nan = self.execution.step(len(images), self._logits, images)
            else:
                logits, nan = self._logits(images)
            if bool(nan):
                raise ValueError("engine: images must be numbers, got NaN")
            return logits

    def values(self, images: Tensor) -> dict[str, Tensor]:
        """Every value of the network: int64 integers, and the logits."""
        values, logits = self._run(images)
        return {name: value.integers() for name, value in values.items()} | {self.graph.output: logits}

    def _logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self._run(images)[1], images.isnan().any()

    def _run(self, images: Tensor) -> tuple[Values, Tensor]:
        values: Values = {}
        for step, following in self.calls:
            if isinstance(step, Quantize):
                for out in step.outs:
                    grid = self.graph.grids[out]
                    values[out] = quantize(images, grid, activation=step.activation, check_nan=False, **self.settings)
                continue
            then = None if following is None else self._requantize(following)
            results = _OPERATORS[type(step)](self, step, values, then)
            if isinstance(results, Tensor):
                return values, results.flatten(1)
            names = step.outs + (() if following is None else following.outs)
            values |= dict(zip(names, results, strict=True))
        raise AssertionError("a checked graph ends in its output")

    def _requantize(self, step: Rescale) -> Requantize:
        return Requantize(self.grids(step), *self.norm(step), activation=step.activation)

    def grids(self, step: Step) -> tuple[Grid, ...]:
        """Of a step's results; none of logits."""
        return tuple(self.graph.grids[out] for out in step.outs if out in self.graph.grids)

    def norm(self, step: Rescale) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """mean, mult and bias on the device."""
        return self._constant(step.mean), self._constant(step.mult), self._constant(step.bias)

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
        shape = (*self.shapes[step.x], 1, 1)[:3]
        return step.weight if step.weight.dim() == 4 else step.weight.reshape(-1, *shape)

    def layer(self, step: Layer, values: Values, then: Requantize | None) -> Any:
        residual = None if step.residual is None else values[step.residual]
        return int_conv2d(
            values[step.x], self._weights[step.outs], self._moved[id(step.mult)], self._moved[id(step.bias)],
            self.grids(step), stride=step.stride, padding=step.padding, dilation=step.dilation, groups=step.groups,
            residual=residual, activation=step.activation, then=then, **self.settings,
        )  # fmt: skip

    def rescale(self, step: Rescale, values: Values, then: Requantize | None) -> Any:
        mean, mult, bias = self.norm(step)
        return requantize(
            values[step.x], self.grids(step), mean=mean, mult=mult, bias=bias, activation=step.activation, then=then,
            **self.settings,
        )  # fmt: skip

    def add(self, step: Add, values: Values, then: Requantize | None) -> Any:
        return requantize(
            values[step.x], self.grids(step), other=values[step.other], activation=step.activation, then=then,
            **self.settings,
        )  # fmt: skip

    def average_pool(self, step: AveragePool, values: Values, _: None) -> Any:
        window: dict[str, Any] = {"output_size": step.output}
        if step.kernel is not None:
            window = {"kernel_size": step.kernel, "stride": step.stride, "padding": step.padding}
        return int_pool(values[step.x], self.grids(step), activation=step.activation, **window, **self.settings)

    def max_pool(self, step: MaxPool, values: Values, _: None) -> Any:
        return int_pool(
            values[step.x], mode="max", kernel_size=step.kernel, stride=step.stride, padding=step.padding,
            dilation=step.dilation, ceil_mode=step.ceil_mode, **self.settings,
        )  # fmt: skip


_OPERATORS: dict[type[Step], Callable[..., Any]] = {
    Layer: OperatorNetwork.layer, Rescale: OperatorNetwork.rescale, Add: OperatorNetwork.add,
    AveragePool: OperatorNetwork.average_pool, MaxPool: OperatorNetwork.max_pool,
}  # fmt: skip


def _calls(graph: IntegerGraph) -> list[tuple[Step, Rescale | None]]:
    """The steps in their order, and with each the rescale step that its operator computes from its first result."""
    calls: list[tuple[Step, Rescale | None]] = []
    for group in fuse(graph):
        follows = isinstance(group.step, _FOLLOWED)
        taken = next((other for other in group.chained if follows and other.x == group.step.outs[0]), None)
        calls.append((group.step, taken))
        calls += [(other, None) for other in group.chained if other is not taken]
    return calls
