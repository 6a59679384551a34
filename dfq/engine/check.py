"""What makes an integer graph a network: whoever runs one may rely on this, whatever file it came from."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dfq.engine.graph import (
    ACTIVATIONS,
    IMAGES,
    Add,
    AveragePool,
    Grid,
    IntegerGraph,
    Layer,
    MaxPool,
    Quantize,
    Rescale,
    Step,
    inputs,
)  # fmt: skip
from dfq_kernels.int_pool.schema import largest_window, out_sides, windows_meet

Shape = tuple[int, ...]
LARGEST = 2**31 - 1  # elements of a value, for one image; sums of a layer
LARGEST_SIDE = 2**16
MOST_OUTS = 4  # results of one step


class GraphError(ValueError):
    """A graph that is no network."""


def require(ok: bool, name: str, rule: str, value: Any) -> None:
    """Raises `integer graph: <name> must be <rule>, got <value>` unless `ok`."""
    if not ok:
        raise GraphError(f"integer graph: {name} must be {rule}, got {value!r}")


def check_graph(graph: IntegerGraph) -> dict[str, Shape]:
    """The shape of every value, for one image: `(C, H, W)` or `(C,)`.

    Raises:
        GraphError: a value that is read before it is made, shapes that do not fit, numbers out of their ranges.
    """
    _sides("input_shape", graph.input_shape, 3, least=1)
    require(type(graph.num_classes) is int and graph.num_classes >= 1, "num_classes", "at least 1", graph.num_classes)
    if graph.normalization is not None:
        mean, std = graph.normalization
        fits = len(mean) == len(std) == graph.input_shape[0] and all(math.isfinite(value) for value in (*mean, *std))
        require(fits and min(std) > 0, "normalization", "a mean and a deviation > 0 per channel", graph.normalization)
    shapes: dict[str, Shape] = {IMAGES: graph.input_shape}
    require(IMAGES not in graph.grids, "the images", "without a grid", "one")
    for name, grid in graph.grids.items():
        _check_grid(name, grid)
    require(bool(graph.steps), "steps", "at least one", 0)
    for step in graph.steps:
        for name in inputs(step):
            known = isinstance(name, str) and name in shapes and (name in graph.grids or isinstance(step, Quantize))
            require(known, "an input", "a quantized value of an earlier step", name)
        require(step.activation in ACTIVATIONS, "activation", "None, relu or relu6", step.activation)
        shape = _SHAPES[type(step)](step, shapes, graph)
        size = math.prod(shape)
        require(0 < size <= LARGEST, f"the shape of {step.outs}", f"of 1 to {LARGEST} elements", shape)
        some = isinstance(step.outs, tuple) and 1 <= len(step.outs) <= MOST_OUTS
        require(some, "outs", f"1 to {MOST_OUTS} results", step.outs)
        integers_or_logits = graph.output not in step.outs or step.outs == (graph.output,)
        require(integers_or_logits, "the output's step", "of the output alone", step.outs)
        for out in step.outs:
            require(isinstance(out, str) and out not in shapes, "a result", "a new name", out)
            require(out in graph.grids or out == graph.output, out, "on a grid, or the output", "neither")
            shapes[out] = shape
    require(
        graph.output in shapes and graph.output not in graph.grids, "output", "a result without a grid", graph.output
    )
    logits = shapes[graph.output]
    one_each = logits[0] == graph.num_classes and math.prod(logits) == graph.num_classes
    require(one_each, "logits", f"[{graph.num_classes}]", logits)
    return shapes


def _check_grid(name: str, grid: Grid) -> None:
    integers = (grid.zero_point, grid.quant_min, grid.quant_max)
    require(all(type(value) is int for value in integers), f"the grid of {name}", "integers", integers)
    low, high = (-128, 127) if grid.quant_min < 0 else (0, 255)
    require(low <= grid.quant_min < grid.quant_max <= high, f"the grid of {name}", "of 8 bits at most", integers)
    inside = grid.quant_min <= grid.zero_point <= grid.quant_max
    require(inside, f"the zero point of {name}", "on its grid", grid.zero_point)
    scale = grid.scale
    normal = isinstance(scale, float) and 2.0**-126 <= scale <= 2.0**64
    require(normal, f"the scale of {name}", "in [2^-126, 2^64]", scale)


def _sides(name: str, value: Any, length: int, least: int) -> None:
    numbers = isinstance(value, tuple) and len(value) == length and all(type(side) is int for side in value)
    ok = numbers and all(least <= side <= LARGEST_SIDE for side in value)
    require(ok, name, f"{length} integers in [{least}, {LARGEST_SIDE}]", value)


def _tensor(name: str, value: Any, dtype: torch.dtype, shape: Shape | None = None) -> None:
    fits = isinstance(value, Tensor) and value.dtype == dtype and (shape is None or tuple(value.shape) == shape)
    got = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else value
    require(fits, name, f"{str(dtype).removeprefix('torch.')} {'' if shape is None else shape}".strip(), got)
    if dtype.is_floating_point:
        largest = float(value.abs().max()) if value.numel() else 0.0  # NaN, if there is one
        require(largest <= 2.0**64, name, "at most 2^64 in magnitude", largest)  # no step makes NaN of them


def _quantize(step: Quantize, shapes: dict[str, Shape], graph: IntegerGraph) -> Shape:
    require(step.x == IMAGES, "a quantize step's input", IMAGES, step.x)
    return graph.input_shape


def _layer(step: Layer, shapes: dict[str, Shape], graph: IntegerGraph) -> Shape:
    require(isinstance(step.name, str), "a layer's name", "text", step.name)
    name, x = f"layer {step.name}", shapes[step.x]
    _tensor(f"{name}: weight", step.weight, torch.int8)
    require(
        step.weight.dim() in (2, 4) and step.weight.numel() > 0, f"{name}: weight", "of 2 or 4 axes", step.weight.shape
    )
    out = step.weight.shape[0]
    for key in ("mult", "bias"):
        _tensor(f"{name}: {key}", getattr(step, key), torch.float32, (out,))
    bits = step.weight_bits
    require(type(bits) is int and 2 <= bits <= 8, f"{name}: weight_bits", "in [2, 8]", bits)
    low, high = int(step.weight.min()), int(step.weight.max())
    require(-(2 ** (bits - 1)) <= low and high < 2 ** (bits - 1), f"{name}: weight", f"of {bits} bits", (low, high))
    grid = graph.grids[step.x]
    largest = max(grid.quant_max - grid.zero_point, grid.zero_point - grid.quant_min)
    bound = largest * int(step.weight.flatten(1).abs().sum(1, dtype=torch.int64).max())
    require(bound <= LARGEST, f"{name}: the largest sum", "below 2^31", bound)
    if step.weight.dim() == 2:
        geometry = step.stride, step.padding, step.dilation, step.groups
        require(geometry == ((1, 1), (0, 0), (1, 1), 1), f"{name}: geometry", "none of a linear layer", geometry)
        require(math.prod(x) == step.weight.shape[1], f"{name}: weight", f"[out, {math.prod(x)}]", step.weight.shape)
        shape: Shape = (out,)
    else:
        shape = _convolved(name, step, x)
    if step.residual is not None:
        require(
            _flat(shapes[step.residual]) == _flat(shape),
            f"{name}: residual",
            f"of shape {shape}",
            shapes[step.residual],
        )
    return shape


def _convolved(name: str, step: Layer, x: Shape) -> Shape:
    require(len(x) == 3, f"{name}: input", "(C, H, W)", x)
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
        _sides(f"{name}: {key}", value, 2, least)
    for side, k, s, p, d in zip(x[1:], kernel, stride, padding, dilation, strict=True):
        span = side + 2 * p - d * (k - 1) - 1 + (s - 1 if ceil else 0)
        require(span >= 0, f"{name}: kernel", f"within {side} and its padding", k)
    return tuple(out_sides(x[1:], kernel, stride, padding, dilation, ceil))


def _rescale(step: Rescale, shapes: dict[str, Shape], graph: IntegerGraph) -> Shape:
    constants = (step.mean, step.mult, step.bias)
    together = all(item is None for item in constants) or all(item is not None for item in constants)
    require(together, "mean, mult and bias of a rescale step", "given together", "some of them")
    for key in () if step.mean is None else step.tensors:
        _tensor(f"rescale: {key}", getattr(step, key), torch.float32, (shapes[step.x][0],))
    return shapes[step.x]


def _add(step: Add, shapes: dict[str, Shape], graph: IntegerGraph) -> Shape:
    require(
        _flat(shapes[step.x]) == _flat(shapes[step.other]),
        "the sides of an addition",
        "of one shape",
        shapes[step.other],
    )
    return shapes[step.x]


def _average_pool(step: AveragePool, shapes: dict[str, Shape], graph: IntegerGraph) -> Shape:
    x = shapes[step.x]
    require(len(x) == 3, "the input of a pool", "(C, H, W)", x)
    grid = graph.grids[step.x]
    largest = max(grid.quant_max - grid.zero_point, grid.zero_point - grid.quant_min)
    if step.kernel is not None:
        _half_padding(step.kernel, step.padding)
        bound = largest * math.prod(step.kernel)
        require(bound <= LARGEST, "average pool: the largest sum", "below 2^31", bound)
        return x[0], *_window("average pool", x, step.kernel, step.stride, step.padding, (1, 1))
    geometry = step.stride, step.padding
    require(geometry == ((1, 1), (0, 0)), "average pool: geometry", "none of an adaptive pool", geometry)
    _sides("average pool: output", step.output, 2, 1)
    fits = all(parts <= side for parts, side in zip(step.output, x[1:], strict=True))
    require(fits, "average pool: output", f"at most {x[1:]}", step.output)
    bound = largest * math.prod(largest_window(x[1:], step.output))
    require(bound <= LARGEST, "average pool: the largest sum", "below 2^31", bound)
    return x[0], *step.output


def _max_pool(step: MaxPool, shapes: dict[str, Shape], graph: IntegerGraph) -> Shape:
    x = shapes[step.x]
    require(len(x) == 3, "the input of a pool", "(C, H, W)", x)
    require(type(step.ceil_mode) is bool, "max pool: ceil_mode", "true or false", step.ceil_mode)
    _half_padding(step.kernel, step.padding)
    same = len(step.outs) == 1 and graph.grids.get(step.outs[0]) == graph.grids[step.x]
    require(same and step.activation is None, "the result of a max pool", "one on the grid of its input", step.outs)
    counts = _window("max pool", x, step.kernel, step.stride, step.padding, step.dilation, step.ceil_mode)
    meets = windows_meet(x[1:], counts, step.kernel, step.stride, step.padding, step.dilation)
    require(meets, "max pool: every window", "one that meets the map", step.kernel)
    return x[0], *counts


def _flat(shape: Shape) -> Shape:
    """A map of one pixel is its channels."""
    return shape[:1] if shape[1:] == (1, 1) else shape


def _half_padding(kernel: Shape, padding: Shape) -> None:
    _sides("a pool's kernel", kernel, 2, 1)
    _sides("a pool's padding", padding, 2, 0)
    half = all(2 * p <= k for p, k in zip(padding, kernel, strict=True))
    require(half, "a pool's padding", "at most half of its kernel", padding)


_SHAPES: dict[type[Step], Callable[..., Shape]] = {
    Quantize: _quantize, Layer: _layer, Rescale: _rescale, Add: _add, AveragePool: _average_pool, MaxPool: _max_pool,
}  # fmt: skip
