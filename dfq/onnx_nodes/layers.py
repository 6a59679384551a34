"""Layers in ONNX: sums of int8 weights, their bias, and what is added to them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dfq.engine.graph import IntegerGraph, Layer, as_map
from dfq.export import ExportError
from dfq.onnx_nodes.values import Writer, bounds
from dfq_kernels.activations import activation_of

ROOM = 2.0**30  # of the accumulators' 2^31: what a channel's sums and its bias may take
SMALLEST = 2.0**-125  # scale, and product with the input's scale: normal in fp32
LARGEST = 2.0**120  # scale, so that 8-bit integers times it are finite
SATURATED = 2**15 - 1  # where AVX2 without VNNI adds two products in 16 bits
MOST_MOVED = 1 / 16  # steps of an 8-bit grid
NOTHING_LEFT = -9  # 8-bit integers without their 9 lowest bits are 0


def layer(writer: Writer, step: Layer, out: str) -> str:
    """`t` of a layer."""
    channels = _channels(step, writer.graph)
    parameters = [writer.constant(f"{out}.weight_scale", channels.scale),
                  writer.constant(f"{out}.weight_zero_point", np.zeros(len(channels.scale), np.int8))]  # fmt: skip
    narrow = any(grid.bits < 8 for grid in writer.graph.grids.values())  # there one result more or less is much
    at_once = step.residual is None and channels.moved <= (0.0 if narrow else MOST_MOVED)  # sums, bias, rounding in one
    if step.weight.dim() == 2 or (_of_pixels(step) and not at_once):
        total = _matmul(writer, step, channels, parameters, out)
    else:
        inside = at_once or step.residual is not None
        total = _convolution(writer, step, channels, parameters, out, inside=inside)
    if step.residual is not None:
        total = writer.node("Add", [total, writer.real(step.residual, writer.shapes[step.outs[0]])], out)
    return total


def _convolution(
    writer: Writer, step: Layer, channels: _Channels, parameters: list[str], out: str, inside: bool
) -> str:
    """Sums and bias; `inside`: the bias is the convolution's, and whoever rounds its result may round it, too."""
    weight = writer.constant(f"{out}.weight", channels.weight)
    real = writer.node("DequantizeLinear", [weight, *parameters], f"{out}.real_weight", axis=0)
    window = {"kernel_shape": step.weight.shape[2:], "strides": step.stride, "dilations": step.dilation,
              "pads": [*step.padding, *step.padding], "group": step.groups}  # fmt: skip
    x = writer.real(step.x, as_map(writer.shapes[step.x]))
    if inside:
        bias = writer.constant(f"{out}.bias", channels.bias)
        total = writer.node("Conv", [x, real, bias], f"{out}.sums", **window)
    else:
        total = writer.node("Conv", [x, real], f"{out}.sums", **window)
        total = _biased(writer, total, channels.bias.view(-1, 1, 1), out)
    return _turned(writer, total, channels.sign.view(-1, 1, 1), out)


def _matmul(writer: Writer, step: Layer, channels: _Channels, parameters: list[str], out: str) -> str:
    """A linear layer, or a convolution of single pixels, which ONNX Runtime multiplies as integers though its sums
    are not rounded; it does so with no convolution."""
    weight = writer.constant(f"{out}.weight", channels.weight.flatten(1).T)
    real = writer.node("DequantizeLinear", [weight, *parameters], f"{out}.real_weight", axis=1)
    x, linear = step.x, step.weight.dim() == 2
    if not linear:
        x = writer.node("Transpose", [writer.integers(x, as_map(writer.shapes[x]))], f"{out}.pixels", perm=[0, 2, 3, 1])
    elif len(writer.shapes[x]) > 1:
        x = writer.node("Flatten", [x], f"{out}.flat", axis=1)
    pixels = writer.node("DequantizeLinear", [x, *writer.grid_of(step.x)], f"{out}.real")
    total = writer.node("Gemm" if linear else "MatMul", [pixels, real], f"{out}.sums")
    total = _turned(writer, _biased(writer, total, channels.bias, out), channels.sign, out)
    return total if linear else writer.node("Transpose", [total], f"{out}.map", perm=[0, 3, 1, 2])


def _biased(writer: Writer, total: str, bias: Tensor, out: str) -> str:
    return writer.node("Add", [total, writer.constant(f"{out}.bias", bias)], f"{out}.biased")


def _turned(writer: Writer, total: str, sign: Tensor, out: str) -> str:
    if bool((sign > 0).all()):
        return total
    return writer.node("Mul", [total, writer.constant(f"{out}.sign", sign)], f"{out}.turned")


def _of_pixels(step: Layer) -> bool:
    """No pixel of the result sees two of the input."""
    return (*step.weight.shape[2:], *step.stride, *step.padding, step.groups) == (1, 1, 1, 1, 0, 0, 1)


class _Channels(NamedTuple):
    """A layer as ONNX takes it: int8, scales > 0, and bias; `sign` multiplies the sums of both.

    moved: by how many steps of its result's grid a runtime moves a channel that rounds the bias to the grid of the
    accumulators; 0 where no result changes.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor
    sign: Tensor
    moved: float


def _channels(step: Layer, graph: IntegerGraph) -> _Channels:
    """The weights times a factor per channel, and their scale over it.

    A factor above 1 changes no real weight and makes the grid of the accumulators finer, to which runtimes round the
    bias. One below 1, where the bias would leave int32 or a scale would not be normal, rounds weights that hardly move
    the channel: by at most `|bias| / 2^31` for every unit of its input. A channel that nothing moves has weights 0.
    """
    grid = graph.grids[step.x]
    weight, size, bias = step.weight.flatten(1).double(), step.mult.double().abs(), step.bias.double()
    sums = grid.largest * weight.abs().sum(1)
    room = ROOM / (sums + bias.abs() / size.clamp(min=1e-300)).clamp(min=1)
    normal = size / SMALLEST * min(1.0, 1 / grid.scale)
    widest = min(127, SATURATED // 2 // (grid.quant_max - grid.quant_min))
    finest = (widest / weight.abs().amax(1).clamp(min=1)).clamp(min=1)
    most = torch.stack([room, normal, finest]).amin(0)
    fine, bias, moved = _rounded_bias(step, graph, most.floor().clamp(min=1))
    coarse = torch.exp2(torch.log2(most).floor().clamp(min=NOTHING_LEFT))
    factor = torch.where(most < 1, coarse, fine)
    constant = (coarse == 2.0**NOTHING_LEFT) | (weight == 0).all(1)
    least = torch.where(bias == 0, grid.scale, bias.abs() / ROOM).clamp(min=SMALLEST * max(1.0, grid.scale))
    scale = torch.where(constant, least, size / factor) / grid.scale
    if float(scale.max()) > LARGEST:
        rule = f"weight scales of {step.name} must be at most 2^120 in ONNX"
        raise ExportError(f"export: {rule}, got {float(scale.max()):.3g}")
    turned = torch.where(step.mult < 0, -1.0, 1.0).double()
    integers = (weight * factor[:, None]).round() * torch.where(constant, 0.0, turned)[:, None]
    sign = torch.where(integers.amax(1) > 127, -1.0, 1.0).double()  # -128 cannot be turned around in int8
    return _Channels((integers * sign[:, None]).to(torch.int8).view(step.weight.shape), scale.float(),
                     (bias * sign).float(), sign.float(), moved)  # fmt: skip


def _rounded_bias(step: Layer, graph: IntegerGraph, most: Tensor) -> tuple[Tensor, Tensor, float]:
    """A factor of 1 to `most` per channel; the bias, as a runtime would round it; `moved` of `_Channels`.

    Sums of integers pass from one result to the next between two integers. So the bias may lie anywhere in an interval
    without any result being another one. Of all multiples of `mult / factor` the nearest to its middle is taken, and
    the bias left as it is where none lies inside.
    """
    bias = step.bias.double()
    grid = graph.grids.get(step.outs[0])
    clamped = activation_of(step.activation).bounds is not None
    if grid is None or len(step.outs) > 1 or step.residual is not None or not clamped:
        return most, bias, 0.0  # its convolution stays in floating point
    low, high = bounds(grid, step.activation)
    if low == high:  # whatever the sums are
        return most, bias, 0.0
    size = step.mult.double().abs().clamp(min=1e-300)
    edges = (torch.arange(low, high).double() + 0.5 - grid.zero_point) * grid.scale / size[:, None]
    first = (edges - (bias / size)[:, None]).ceil()  # sum that is past an edge
    reached = first.abs() <= graph.grids[step.x].largest * step.weight.flatten(1).double().abs().sum(1, keepdim=True)
    least = torch.where(reached, edges - first, -0.5 + (bias / size)[:, None]).amax(1)
    below = torch.where(reached, edges - first + 1, 0.5 + (bias / size)[:, None]).amin(1)
    middle = (least + below) / 2
    factor, nearest = torch.ones_like(most), middle.round()
    for tried in range(2, int(most.max()) + 1):
        place = (middle * tried).round() / tried
        nearer = ((place - middle).abs() < (nearest - middle).abs()) & (most >= tried)
        factor, nearest = torch.where(nearer, tried, factor), torch.where(nearer, place, nearest)
    inside = (nearest > least) & (nearest < below) | ~reached.any(1)
    off = (bias / size * factor).round() / factor * size - bias
    moved = float(torch.where(inside, 0.0, off.abs() / grid.scale).max())
    return factor, torch.where(inside, nearest * size, bias), moved
