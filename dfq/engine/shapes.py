"""What a step must be, kind by kind, and the shape of what it makes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from dfq.engine.graph import (
    IMAGES,
    Add,
    AveragePool,
    Grid,
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
from dfq.engine.rules import (
    LARGEST,
    LARGEST_SIDE,
    Shape,
    check_places,
    check_scale,
    check_sides,
    check_tensor,
    require,
)
from dfq_kernels.int_pool.schema import largest_window, multipliers, out_sides, windows_meet

MOST_SOURCES = 512  # of a move: csrc/cpu/program.h


def shape_of(step: Step, shapes: dict[str, Shape], graph: IntegerGraph) -> Shape:
    """Of a step's results.

    Args:
        step: its inputs are known to be values on grids.
        shapes: of the values before it.
        graph: the whole network.

    Raises:
        GraphError: numbers or tensors that are not those of such a step.
    """
    return _SHAPES[type(step)](step, shapes, graph)


def flat(shape: Shape) -> Shape:
    """A map of one pixel is its channels."""
    return shape[:1] if shape[1:] == (1, 1) else shape


def pool_multipliers(step: AveragePool, scale: float, sides: Shape, counts: Shape) -> torch.Tensor:
    """fp32 `[OH, OW]`; sides: of the map; counts: of the windows."""
    kernel, adaptive = ((1, 1), step.output) if step.kernel is None else (step.kernel, ())
    return multipliers(
        scale, sides, counts, kernel, step.stride, step.padding, adaptive, step.count_include_pad, step.divisor
    )


def _quantize(step: Quantize, shapes: dict[str, Shape], graph: IntegerGraph) -> Shape:
    require(step.x == IMAGES, "a quantize step's input", IMAGES, step.x)
    return shapes[IMAGES]


def _layer(step: Layer, shapes: dict[str, Shape], graph: IntegerGraph) -> Shape:
    require(isinstance(step.name, str), "a layer's name", "text", step.name)
    name, x, weight = f"layer {step.name}", shapes[step.x], step.weight
    check_tensor(f"{name}: weight", weight, torch.int8)
    require(weight.dim() in (2, 4) and weight.numel() > 0, f"{name}: weight", "of 2 or 4 axes", weight.shape)
    out = weight.shape[0]
    for key in ("mult", "bias"):
        check_tensor(f"{name}: {key}", getattr(step, key), torch.float32, (out,))
    bits = step.weight_bits
    require(type(bits) is int and 2 <= bits <= 8, f"{name}: weight_bits", "in [2, 8]", bits)
    low, high = int(weight.min()), int(weight.max())
    require(-(2 ** (bits - 1)) <= low and high < 2 ** (bits - 1), f"{name}: weight", f"of {bits} bits", (low, high))
    bound = graph.grids[step.x].largest * int(weight.flatten(1).short().abs().sum(1, dtype=torch.int64).max())
    require(bound <= LARGEST, f"{name}: the largest sum", "below 2^31", bound)
    if weight.dim() == 2:
        geometry = step.stride, step.padding, step.dilation, step.groups
        require(geometry == ((1, 1), (0, 0), (1, 1), 1), f"{name}: geometry", "none of a linear layer", geometry)
        require(math.prod(x) == weight.shape[1], f"{name}: weight", f"[out, {math.prod(x)}]", weight.shape)
        shape: Shape = (out,)
    else:
        shape = _convolved(name, step, as_map(x))
    if step.residual is not None:
        residual = shapes[step.residual]
        require(flat(residual) == flat(shape), f"{name}: residual", f"of shape {shape}", residual)
    return shape


def _convolved(name: str, step: Layer, x: Shape) -> Shape:
    groups, (out, inner, *kernel) = step.groups, step.weight.shape
    divides = type(groups) is int and groups >= 1 and out % groups == 0 and inner * groups == x[0]
    require(divides, f"{name}: groups", f"a divisor of {x[0]} and {out} channels that fits the weight", groups)
    return out, *_window(name, x, tuple(kernel), step.stride, step.padding, step.dilation)


def _window(
    name: str, x: Shape, kernel: Shape, stride: Shape, padding: Shape, dilation: Shape, ceil: bool = False
) -> Shape:
    """Height and width of what a window makes."""
    for key, value, least in (
        ("kernel", kernel, 1),
        ("stride", stride, 1),
        ("padding", padding, 0),
        ("dilation", dilation, 1),
    ):
        check_sides(f"{name}: {key}", value, 2, least)
    for side, k, s, p, d in zip(x[1:], kernel, stride, padding, dilation, strict=True):
        span = side + 2 * p - d * (k - 1) - 1 + (s - 1 if ceil else 0)
        require(span >= 0, f"{name}: kernel", f"within {side} and its padding", k)
    return tuple(out_sides(x[1:], kernel, stride, padding, dilation, ceil))


def _rescale(step: Rescale, shapes: dict[str, Shape], graph: IntegerGraph) -> Shape:
    constants = (step.mean, step.mult, step.bias)
    together = all(item is None for item in constants) or all(item is not None for item in constants)
    require(together, "mean, mult and bias of a rescale step", "given together", "some of them")
    for key in step.tensors:
        if getattr(step, key) is not None:
            check_tensor(f"rescale: {key}", getattr(step, key), torch.float32, (shapes[step.x][0],))
    return shapes[step.x]


def _table(step: Table, shapes: dict[str, Shape], graph: IntegerGraph) -> Shape:
    check_tensor("table: values", step.values, torch.float32, (graph.grids[step.x].levels,))
    require(isinstance(step.function, str), "table: function", "text", step.function)
    return shapes[step.x]


def _add(step: Add | Multiply, shapes: dict[str, Shape], graph: IntegerGraph) -> Shape:
    x, other = as_map(shapes[step.x]), as_map(shapes[step.other])
    fits = other in (x, (x[0], 1, 1), (1, *x[1:]))
    require(fits, f"the other side of {step.kind}", f"of shape {x}, a vector of it or one channel", other)
    return shapes[step.x]


def _multiply(step: Multiply, shapes: dict[str, Shape], graph: IntegerGraph) -> Shape:
    check_scale("multiply: scale", step.scale)
    return _add(step, shapes, graph)


def _average_pool(step: AveragePool, shapes: dict[str, Shape], graph: IntegerGraph) -> Shape:
    x, grid = as_map(shapes[step.x]), graph.grids[step.x]
    flags = type(step.ceil_mode) is bool and type(step.count_include_pad) is bool
    require(flags, "average pool: ceil_mode and count_include_pad", "true or false", step.ceil_mode)
    divisor = type(step.divisor) is int and 0 <= step.divisor <= LARGEST
    require(divisor, "average pool: divisor", f"in [0, {LARGEST}]", step.divisor)
    if step.kernel is None:
        geometry = step.stride, step.padding, step.ceil_mode, step.divisor
        require(geometry == ((1, 1), (0, 0), False, 0), "average pool: geometry", "none of an adaptive pool", geometry)
        return x[0], *_adaptive(step, x, grid)
    _half_padding(step.kernel, step.padding)
    _check_sum(grid, math.prod(step.kernel))
    return x[0], *_window("average pool", x, step.kernel, step.stride, step.padding, (1, 1), step.ceil_mode)


def _max_pool(step: MaxPool, shapes: dict[str, Shape], graph: IntegerGraph) -> Shape:
    x = as_map(shapes[step.x])
    require(type(step.ceil_mode) is bool, "max pool: ceil_mode", "true or false", step.ceil_mode)
    same = len(step.outs) == 1 and graph.grids.get(step.outs[0]) == graph.grids[step.x]
    require(same and step.activation is None, "the result of a max pool", "one on the grid of its input", step.outs)
    if step.kernel is None:
        geometry = step.stride, step.padding, step.dilation, step.ceil_mode
        none = ((1, 1), (0, 0), (1, 1), False)
        require(geometry == none, "max pool: geometry", "none of an adaptive pool", geometry)
        check_sides("max pool: output", step.output, 2, 1)
        return x[0], *step.output
    _half_padding(step.kernel, step.padding)
    counts = _window("max pool", x, step.kernel, step.stride, step.padding, step.dilation, step.ceil_mode)
    meets = windows_meet(x[1:], counts, step.kernel, step.stride, step.padding, step.dilation)
    require(meets, "max pool: every window", "one that meets the map", step.kernel)
    return x[0], *counts


def _adaptive(step: AveragePool, x: Shape, grid: Grid) -> Shape:
    check_sides("average pool: output", step.output, 2, 1)
    _check_sum(grid, math.prod(largest_window(x[1:], step.output)))
    return step.output


def _check_sum(grid: Grid, places: int) -> None:
    require(grid.largest * places <= LARGEST, "average pool: the largest sum", "below 2^31", grid.largest * places)


def _half_padding(kernel: Any, padding: Any) -> None:
    """So that every window without dilation meets the map."""
    check_sides("a pool's kernel", kernel, 2, 1)
    check_sides("a pool's padding", padding, 2, 0)
    half = all(2 * p <= k for p, k in zip(padding, kernel, strict=True))
    require(half, "a pool's padding", "at most half of its kernel", padding)


def _move(step: Move, shapes: dict[str, Shape], graph: IntegerGraph) -> Shape:
    check_sides("move: shape", step.shape, 3, 1)
    maps = [as_map(shapes[name]) for name in (step.x, *step.others)]
    require(isinstance(step.others, tuple), "move: others", "a tuple of names", step.others)
    require(len(maps) <= MOST_SOURCES, "move: inputs", f"at most {MOST_SOURCES}", len(maps))
    require(len(step.outs) == 1 and step.activation is None, "move: its result", "one without activation", step.outs)
    grid = graph.grids[step.outs[0]]
    same = all(graph.grids[name] == grid for name in (step.x, *step.others))
    require(same, "move: every input", "on the grid of the result", (step.x, *step.others))
    fill = type(step.fill) is int and grid.quant_min <= step.fill <= grid.quant_max
    require(fill, "move: fill", f"in [{grid.quant_min}, {grid.quant_max}]", step.fill)
    channels, height, width = step.shape
    if step.index is not None:
        alone = step.channels is None and step.pixels is None
        require(alone, "move: index", "given without channels and pixels", "both")
        total = sum(math.prod(item) for item in maps)
        check_places("move: index", step.index, (math.prod(step.shape),), -1, total)
        return step.shape
    sides = maps[0][1:]
    fits = max(sides) <= LARGEST_SIDE and all(item[1:] == sides for item in maps)
    require(fits, "move: inputs", f"maps of one size, with sides up to {LARGEST_SIDE}", maps)
    total = sum(item[0] for item in maps)
    if step.channels is None:
        require(channels == total, "move: shape", f"of {total} channels", step.shape)
    else:
        check_places("move: channels", step.channels, (channels,), -1, total)
    if step.pixels is None:
        require((height, width) == sides, "move: shape", f"of maps of {sides}", step.shape)
    else:
        check_places("move: pixels", step.pixels, (height * width,), -1, math.prod(sides))
    return step.shape


def _resize(step: Resize, shapes: dict[str, Shape], graph: IntegerGraph) -> Shape:
    channels, *sides = as_map(shapes[step.x])
    found = []
    for name, places, weights, side in (
        ("rows", step.rows, step.row_weights, sides[0]),
        ("columns", step.columns, step.column_weights, sides[1]),
    ):
        check_tensor(f"resize: {name}", places, torch.int32)
        count = places.shape[1] if places.dim() == 2 else 0
        require(1 <= count <= LARGEST_SIDE, f"resize: {name}", f"[2, 1 to {LARGEST_SIDE}]", tuple(places.shape))
        check_places(f"resize: {name}", places, (2, count), 0, side)
        check_tensor(f"resize: weights of {name}", weights, torch.float32, (count,))
        inside = bool(((weights >= 0) & (weights <= 1)).all())
        require(inside, f"resize: weights of {name}", "in [0, 1]", float(weights.abs().max()))
        found.append(count)
    return channels, *found


_SHAPES: dict[type[Step], Callable[..., Shape]] = {
    Quantize: _quantize, Layer: _layer, Rescale: _rescale, Table: _table, Add: _add, Multiply: _multiply,
    AveragePool: _average_pool, MaxPool: _max_pool, Move: _move, Resize: _resize,
}  # fmt: skip
