"""A network in ONNX as it is written: nodes, constants, and every value as uint8 and as what it stands for."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from dfq.engine.check import Shape, check_graph
from dfq.engine.graph import IntegerGraph, MaxPool, Move, Step, inputs
from dfq_kernels.activations import activation_of
from dfq_kernels.integers import Grid

UINT8 = 255


class Writer:
    """Nodes in their order, and the constants that they read.

    Integers are the network's less the lowest one that a grid and an activation leave: rounding to uint8 bounds them
    below. Values that pass integers on as they are (moves, maxima) have one lowest integer with those they read.
    """

    def __init__(self, graph: IntegerGraph, onnx: Any) -> None:
        self.graph, self.onnx, self.shapes = graph, onnx, check_graph(graph)
        self.nodes: list[Any] = []
        self.constants: dict[str, Any] = {}
        self.lowest = _lowest(graph)
        self.reals: dict[str, str] = {}  # the tensors of values without a grid
        self._known: dict[tuple[str, Shape | None], str] = {}  # what is written of a value: integers and real numbers

    def node(self, kind: str, inputs: list[str], out: str, **attributes: Any) -> str:
        """Adds a node with one result, `out`."""
        self.nodes.append(self.onnx.helper.make_node(kind, inputs, [out], name=out, **attributes))
        return out

    def constant(self, name: str, value: Any) -> str:
        """A tensor that nodes read."""
        array = value.numpy() if isinstance(value, Tensor) else value
        self.constants[name] = self.onnx.numpy_helper.from_array(np.array(array, order="C"), name)
        return name

    def numbers(self, name: str, *values: int) -> str:
        """int64 `[len(values)]`."""
        return self.constant(name, np.array(values, np.int64))

    def reshaped(self, tensor: str, shape: tuple[int, ...], out: str) -> str:
        """`[N, *shape]`."""
        return self.node("Reshape", [tensor, self.numbers(f"{out}.shape", 0, *shape)], out)

    def integers(self, name: str, shape: Shape) -> str:
        """A value's uint8, `[N, *shape]` of as many elements."""
        if self.shapes[name] == shape:
            return name
        if (name, shape) not in self._known:
            text = "x".join(map(str, shape))
            self._known[name, shape] = self.reshaped(name, shape, f"{name}.as.{text}")
        return self._known[name, shape]

    def real(self, name: str, shape: Shape | None = None) -> str:
        """What a value stands for, `[N, *shape]`; only of values that somebody reads: ONNX Runtime computes what nobody
        does, too."""
        shape = shape or self.shapes[name]
        if (f"{name}.real", shape) not in self._known:
            read = self.integers(name, shape)
            found = self.node("DequantizeLinear", [read, *self.grid_of(name)], f"{read}.real")
            self._known[f"{name}.real", shape] = found
        return self._known[f"{name}.real", shape]

    def grid_of(self, name: str) -> list[str]:
        """The names of a value's scale and zero point."""
        scale, zero_point = f"{name}.scale", f"{name}.zero_point"
        if scale not in self.constants:
            grid = self.graph.grids[name]
            self.constant(scale, np.array(grid.scale, np.float32))
            self.constant(zero_point, np.array(grid.zero_point - self.lowest[name], np.uint8))
        return [scale, zero_point]

    def quantized(self, name: str, real: str, activation: str | None) -> None:
        """`name`, the integers of real numbers after an activation, which is bounds here or has been computed."""
        low, high = bounds(self.graph.grids[name], activation)
        least, most = low - self.lowest[name], high - self.lowest[name]
        bounded = least > 0 or most < UINT8
        rounded = self.node("QuantizeLinear", [real, *self.grid_of(name)], f"{name}.rounded" if bounded else name)
        if bounded:  # not of real numbers: ONNX Runtime keeps a convolution in front of these in floating point
            limits = (("least", least, least > 0), ("most", most, most < UINT8))
            names = [
                self.constant(f"{name}.{end}", np.array(to, np.uint8)) if given else "" for end, to, given in limits
            ]
            self.node("Clip", [rounded, *names][: 3 if names[1] else 2], name)


class Bounds(NamedTuple):
    """Integers that a value may have."""

    low: int
    high: int


def bounds(grid: Grid, activation: str | None) -> Bounds:
    """The integers that a grid and an activation leave: rounding keeps the order, so a clamp may come after it."""
    low, high = grid.quant_min, grid.quant_max
    known = activation_of(activation)
    if known.bounds is not None:
        low, high = (_rounded(end, grid) for end in known.bounds)
    elif known.never_negative:
        low = grid.zero_point
    return Bounds(low, high)


def _rounded(value: float, grid: Grid) -> int:
    """As the engine rounds it, in fp32."""
    if math.isinf(value):
        return grid.quant_max if value > 0 else grid.quant_min
    scaled = np.float32(value) * np.float32(grid.inverse) + np.float32(grid.zero_point)
    return int(np.clip(np.rint(scaled), grid.quant_min, grid.quant_max))


def _lowest(graph: IntegerGraph) -> dict[str, int]:
    """What every value's integers are less: its own lowest one, or the lowest of all that it passes on."""
    found: dict[str, int] = {}
    passed: dict[str, set[str]] = {}
    for step in graph.steps:
        for out in step.outs:
            if out in graph.grids:
                grid = graph.grids[out]
                own = grid.zero_point if _passes_on(step) else bounds(grid, step.activation).low
                found[out] = min(own, grid.zero_point, *([step.fill] if isinstance(step, Move) else []))
                passed[out] = {out}
        if _passes_on(step):
            together = set().union(*(passed[name] for name in (*inputs(step), *step.outs)))
            least = min(found[name] for name in together)
            for name in together:
                passed[name], found[name] = together, least
    return found


def _passes_on(step: Step) -> bool:
    return isinstance(step, (MaxPool, Move))
