"""Pools and resizes in ONNX: its own operators where they mean the same, else sums with constant matrices."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dfq.engine.graph import AveragePool, MaxPool, Resize, as_map
from dfq.engine.shapes import pool_multipliers
from dfq.export.onnx_nodes.values import Writer
from dfq_kernels.int_pool.schema import spans, windows

Sides = tuple[int, ...]
COORDINATES = ("half_pixel", "align_corners", "asymmetric")  # what torch and ONNX both have
CLOSE = 1e-6  # of weights


def average_pool(writer: Writer, step: AveragePool, out: str) -> str:
    """`t` of an average pool: `AveragePool`, or every window's sum times its multiplier."""
    shape = as_map(writer.shapes[step.x])
    sides, counts = shape[1:], as_map(writer.shapes[step.outs[0]])[1:]
    real = writer.real(step.x, shape)
    window = _even(sides, step.output) if step.kernel is None else (step.kernel, step.stride, step.padding)
    if window is not None:
        kernel, stride, padding = window
        ends = _ends(sides, counts, kernel, stride, padding, (1, 1))
        plain = not step.count_include_pad or all(end <= p for end, p in zip(ends, padding, strict=True))
        if plain and not step.divisor:
            return writer.node("AveragePool", [real], out, kernel_shape=kernel, strides=stride,
                               pads=[*padding, *ends], count_include_pad=int(step.count_include_pad))  # fmt: skip
    kernel, adaptive = ((1, 1), step.output) if step.kernel is None else (step.kernel, ())
    inside = spans(sides, counts, kernel, step.stride, step.padding, adaptive)
    rows, columns = (_ones(axis, side) for axis, side in zip(inside, sides, strict=True))
    share = writer.constant(f"{out}.shares", pool_multipliers(step, 1.0, sides, counts))
    return writer.node("Mul", [_product(writer, real, rows, columns, f"{out}.sums"), share], out)


def max_pool(writer: Writer, step: MaxPool) -> None:
    """The value itself: the largest of integers."""
    (out,), shape = step.outs, as_map(writer.shapes[step.x])
    sides, counts = shape[1:], as_map(writer.shapes[out])[1:]
    even = _even(sides, step.output) if step.kernel is None else (step.kernel, step.stride, step.padding)
    if even is not None:
        kernel, stride, padding = even
        pads = [*padding, *_ends(sides, counts, kernel, stride, padding, step.dilation)]
        total = writer.node("MaxPool", [writer.real(step.x, shape)], f"{out}.total", kernel_shape=kernel,
                            strides=stride, dilations=step.dilation, pads=pads)  # fmt: skip
        writer.node("QuantizeLinear", [total, *writer.grid_of(out)], out)
        return
    x = writer.integers(step.x, shape)
    for axis, name in ((2, f"{out}.rows"), (3, out)):  # a window's last place again and again changes no maximum
        edges = windows(sides[axis - 2], step.output[axis - 2])
        most = max(end - begin for begin, end in edges)
        places = [[min(begin + tap, end - 1) for tap in range(most)] for begin, end in edges]
        spread = writer.node("Gather", [x, writer.constant(f"{name}.places", np.array(places, np.int64))],
                             f"{name}.spread", axis=axis)  # fmt: skip
        x = writer.node("ReduceMax", [spread], name, axes=[axis + 1], keepdims=0)


def resize(writer: Writer, step: Resize, out: str) -> str:
    """`t` of a resize: `Resize` where one of its modes has the same weights, else a product with them.

    A result on the grid of its input is a product, too: ONNX Runtime would resize the integers, and cut them off.
    """
    shape = as_map(writer.shapes[step.x])
    real = writer.real(step.x, shape)
    rows = _weights(step.rows, step.row_weights, shape[1])
    columns = _weights(step.columns, step.column_weights, shape[2])
    grids = writer.graph.grids
    if all(grids.get(name) != grids[step.x] for name in step.outs):
        for mode in COORDINATES:
            known = (_onnx_weights(mode, side, len(found)) for side, found in ((shape[1], rows), (shape[2], columns)))
            if all(torch.allclose(a, b, rtol=0, atol=CLOSE) for a, b in zip(known, (rows, columns), strict=True)):
                # not sizes of some axes: ONNX Runtime 1.32 loses them where it moves a Transpose through
                factors = [1.0, 1.0, *(_factor(*pair) for pair in ((shape[1], len(rows)), (shape[2], len(columns))))]
                scales = writer.constant(f"{out}.scales", np.array(factors, np.float32))
                return writer.node("Resize", [real, "", scales], out, mode="linear",
                                   coordinate_transformation_mode=mode)  # fmt: skip
    return _product(writer, real, rows.float(), columns.float(), out)


def _even(sides: Sides, output: Sides) -> tuple[Sides, Sides, Sides] | None:
    """Kernel, stride and padding of an adaptive pool whose windows have one size and one distance."""
    if any(side % parts for side, parts in zip(sides, output, strict=True)):
        return None
    kernel = tuple(side // parts for side, parts in zip(sides, output, strict=True))
    return kernel, kernel, (0, 0)


def _ends(sides: Sides, counts: Sides, kernel: Sides, stride: Sides, padding: Sides, dilation: Sides) -> list[int]:
    """Padding after the map that makes as many windows as torch does, whose ceil_mode is not ONNX's."""
    return [
        max(0, (count - 1) * s + (k - 1) * d + 1 - side - p)
        for side, count, k, s, p, d in zip(sides, counts, kernel, stride, padding, dilation, strict=True)
    ]


def _ones(axis: list[tuple[int, int]], side: int) -> Tensor:
    """`[windows, side]`: 1 inside."""
    place = torch.arange(side)
    return torch.stack([((place >= begin) & (place < end)).float() for begin, end in axis])


def _weights(places: Tensor, weights: Tensor, side: int) -> Tensor:
    """`[out, side]`, float64: what every place of an axis adds."""
    found = torch.zeros(places.shape[1], side, dtype=torch.float64)
    found.scatter_add_(1, places[:1].T.long(), 1 - weights.double()[:, None])
    return found.scatter_add_(1, places[1:].T.long(), weights.double()[:, None])


def _onnx_weights(mode: str, side: int, out: int) -> Tensor:
    """Those of `Resize` to a given size."""
    at = torch.arange(out).double()
    if mode == "align_corners":
        at = at * ((side - 1) / (out - 1)) if out > 1 else at * 0
    elif mode == "half_pixel":
        at = (at + 0.5) * (side / out) - 0.5
    else:
        at = at * (side / out)
    at = at.clamp(0, side - 1)
    first = at.floor()
    places = torch.stack([first, (first + 1).clamp(max=side - 1)]).int()
    return _weights(places, at - first, side)


def _factor(side: int, out: int) -> np.float32:
    """From one side to another, so that the product is not below the integer that it is cut to."""
    factor = np.float32(out / side)
    while int(np.float32(side) * factor) < out or int(side * float(factor)) < out:
        factor = np.nextafter(factor, np.float32(np.inf))
    return factor


def _product(writer: Writer, real: str, rows: Tensor, columns: Tensor, out: str) -> str:
    """`rows @ x @ columns^T` of every channel."""
    across = writer.node("MatMul", [real, writer.constant(f"{out}.columns", columns.T.contiguous())], f"{out}.across")
    return writer.node("MatMul", [writer.constant(f"{out}.rows", rows), across], out)
