"""What makes an integer graph a network: whoever runs one may rely on this, whatever file it came from."""

from __future__ import annotations

import math
from typing import Any

import torch

from dfq.engine.graph import IMAGES, IntegerGraph, MaxPool, Move, Output, Quantize, Step, as_map, inputs
from dfq.engine.rules import (
    LARGEST_SIDE,
    GraphError,
    Shape,
    check_activation,
    check_grid,
    check_places,
    check_size,
    require,
)
from dfq.engine.shapes import shape_of

__all__ = ["GraphError", "Shape", "check_graph"]

MOST_OUTS = 4  # results of one step
MOST_AXES = 8  # of an image
FUNCTIONS = (None, "softmax", "log_softmax")


def check_graph(graph: IntegerGraph) -> dict[str, Shape]:
    """The shape of every value, for one image: `(C, H, W)` or `(C,)`.

    Raises:
        GraphError: a value that is read before it is made, shapes that do not fit, numbers out of their ranges.
    """
    _check_images(graph)
    for name, grid in graph.grids.items():
        check_grid(name, grid)
    require(bool(graph.steps), "steps", "at least one", 0)
    shapes: dict[str, Shape] = {IMAGES: as_map(graph.input_shape)}
    for step in graph.steps:
        for name in inputs(step):
            known = isinstance(name, str) and name in shapes and (name in graph.grids or isinstance(step, Quantize))
            require(known, "an input", "a quantized value of an earlier step", name)
        check_activation(step.activation)
        _check_outs(step, shapes, graph)
        shape = shape_of(step, shapes, graph)
        check_size(f"the shape of {step.outs}", shape)
        shapes |= dict.fromkeys(step.outs, shape)
    require(isinstance(graph.outputs, tuple) and bool(graph.outputs), "outputs", "at least one", graph.outputs)
    for output in graph.outputs:
        _check_output(output, shapes, graph)
    _check_structure(graph)
    return shapes


def _check_images(graph: IntegerGraph) -> None:
    shape = graph.input_shape
    axes = isinstance(shape, tuple) and 1 <= len(shape) <= MOST_AXES
    ok = axes and all(type(side) is int and 1 <= side <= LARGEST_SIDE for side in shape)
    require(ok, "input_shape", f"1 to {MOST_AXES} integers in [1, {LARGEST_SIDE}]", shape)
    check_size("input_shape", shape)
    require(IMAGES not in graph.grids, "the images", "without a grid", "one")
    if graph.normalization is not None:
        mean, std = graph.normalization
        fits = len(mean) == len(std) == shape[0] and all(math.isfinite(value) for value in (*mean, *std))
        require(fits and min(std) > 0, "normalization", "a mean and a deviation > 0 per channel", graph.normalization)


def _check_outs(step: Step, shapes: dict[str, Shape], graph: IntegerGraph) -> None:
    """New names: all of integers, or one of real numbers."""
    outs = step.outs
    some = isinstance(outs, tuple) and 1 <= len(outs) <= MOST_OUTS
    require(some, "outs", f"1 to {MOST_OUTS} results", outs)
    new = all(isinstance(out, str) and out not in shapes for out in outs) and len(set(outs)) == len(outs)
    require(new, "the results of a step", "new names", outs)
    integers = all(out in graph.grids for out in outs)
    require(integers or len(outs) == 1, "the results of a step", "on grids, or a real one alone", outs)
    whole = isinstance(step, (Quantize, MaxPool, Move))
    require(integers or not whole, f"the result of a {step.kind} step", "on a grid", outs)


def _check_output(output: Output, shapes: dict[str, Shape], graph: IntegerGraph) -> None:
    value, shape = output.value, output.shape
    real = isinstance(value, str) and value in shapes and value not in graph.grids and value != IMAGES
    require(real, "an output", "a result without a grid", value)
    sides = isinstance(shape, tuple) and all(type(side) is int and side >= 1 for side in shape)
    require(sides, "an output's shape", "integers above 0", shape)
    size = math.prod(shapes[value])
    if output.order is None:
        require(math.prod(shape) == size, "an output's shape", f"of {size} elements", shape)
    else:
        check_size("an output's shape", shape)
        check_places("an output's order", output.order, (math.prod(shape),), 0, size, torch.int64)
    require(output.function in FUNCTIONS, "an output's function", "None, softmax or log_softmax", output.function)
    inside = type(output.axis) is int and (output.function is None or 1 <= output.axis <= len(shape))
    require(inside, "an output's axis", f"in [1, {len(shape)}]", output.axis)


def _check_structure(graph: IntegerGraph) -> None:
    """Every output stands in it once."""
    found: list[int] = []
    rest: list[Any] = [graph.structure]
    while rest:
        item = rest.pop()
        if isinstance(item, dict):
            require(all(isinstance(key, str) for key in item), "the keys of structure", "text", list(item))
            rest += item.values()
        elif isinstance(item, list):
            rest += item
        else:
            require(type(item) is int, "structure", "of lists, dicts and numbers of outputs", item)
            found.append(item)
    once = sorted(found) == list(range(len(graph.outputs)))
    require(once, "structure", f"of every output once, 0 to {len(graph.outputs) - 1}", graph.structure)
