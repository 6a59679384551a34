"""Integer networks as ONNX: QuantizeLinear and DequantizeLinear around float operators, for other runtimes.

Scales of values are the network's own. Every value is uint8: its integers are the network's less the lowest one that
its grid and its activation leave, so that rounding to 8 bits bounds them below; a Clip of the integers bounds them
above where that is under 255. ReLU, ReLU6 and grids of fewer bits are these bounds, and no operator of their own. No
sum is rounded that the network does not round: what is added to a layer's sums is added to real numbers. The arithmetic
is ONNX's, which differs from `dfq.engine.graph` in this:

- QuantizeLinear divides by the scale where the engine multiplies by its reciprocal, and adds the zero point behind the
  rounding where the engine adds it before: a value at a tie may land on the neighbour;
- a layer's `mult` is split into the input's scale and a weight scale, and a runtime may apply them in another order;
- ONNX Runtime, optimising, rounds a convolution's bias to the grid of its accumulators. Weights of few bits are written
  times a factor that makes this grid finer, and a bias so that its rounding changes no result, where one can be found.
  Elsewhere it moves a result by at most 1/16 of a step, or the bias is an Add that ONNX Runtime does not round: in
  networks that have grids of fewer than 8 bits always.

ONNX Runtime 1.32 then computes in integers every convolution and every linear layer but convolutions of more than one
pixel that something is added to, or whose bias is such an Add.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dfq.running.checkpoint import write_atomic
from dfq.engine.check import Shape, check_graph
from dfq.engine.graph import IMAGES, Add, AveragePool, Grid, IntegerGraph, Layer, MaxPool, Quantize, Rescale, Step
from dfq.errors import first_line
from dfq.export import ExportError

OPSET, IR_VERSION = 17, 8
UINT8 = 255
ROOM = 2.0**30  # of the accumulators' 2^31: what a channel's sums and its bias may take
SMALLEST = 2.0**-125  # scale, and product with the input's scale: normal in fp32
LARGEST = 2.0**120  # scale, so that 8-bit integers times it are finite
SATURATED = 2**15 - 1  # where AVX2 without VNNI adds two products in 16 bits
MOST_MOVED = 1 / 16  # steps of an 8-bit grid
NOTHING_LEFT = -9  # 8-bit integers without their 9 lowest bits are 0


def save_onnx(graph: IntegerGraph, path: Path) -> None:
    """Writes the network as an ONNX file with one input, `images` [N, C, H, W], and one output, `logits`.

    Raises:
        ExportError: the package onnx is not installed, an adaptive pool whose windows differ in size, or weights whose
            scale is beyond fp32.
        CheckpointError: the file cannot be written.
    """
    try:
        import onnx
    except ImportError as error:
        raise ExportError("export: the package onnx must be installed for an ONNX file (pip install onnx)") from error
    model = _Builder(graph, onnx).model()
    try:
        onnx.checker.check_model(model, full_check=True)
    except Exception as error:  # its errors are Exceptions of several modules
        raise ExportError(f"export: the network must have an ONNX form: {first_line(error)}") from error
    write_atomic(path, model.SerializeToString())


class _Builder:
    def __init__(self, graph: IntegerGraph, onnx: Any) -> None:
        self.graph, self.onnx, self.shapes = graph, onnx, check_graph(graph)
        self.nodes: list[Any] = []
        self.constants: dict[str, Any] = {}
        narrow = any(grid.bits < 8 for grid in graph.grids.values())  # there one result more or less is much
        self.most_moved = 0.0 if narrow else MOST_MOVED
        self.read: set[str] = set()  # the real numbers that are there
        self.scales: dict[str, list[str]] = {}  # of every value, the names of its scale and its zero point

    def model(self) -> Any:
        helper, float32 = self.onnx.helper, self.onnx.TensorProto.FLOAT
        for step in self.graph.steps:
            self._end(step, self._total(step))
        images = helper.make_tensor_value_info(IMAGES, float32, ["N", *self.graph.input_shape])
        logits = helper.make_tensor_value_info(self.graph.output, float32, ["N", self.graph.num_classes])
        made = helper.make_graph(self.nodes, "integer_network", [images], [logits], list(self.constants.values()))
        opsets = [helper.make_opsetid("", OPSET)]
        return helper.make_model(made, producer_name="dfq-kernels", opset_imports=opsets, ir_version=IR_VERSION)

    # --- parts --------------------------------------------------------------------------------------------------

    def _node(self, kind: str, inputs: list[str], out: str, **attributes: Any) -> str:
        self.nodes.append(self.onnx.helper.make_node(kind, inputs, [out], name=out, **attributes))
        return out

    def _constant(self, name: str, value: Tensor | np.ndarray) -> str:
        array = value.numpy() if isinstance(value, Tensor) else value
        self.constants[name] = self.onnx.numpy_helper.from_array(np.array(array, order="C"), name)
        return name

    def _real(self, name: str) -> str:
        """What a value stands for; only of values that somebody reads: ONNX Runtime computes what nobody does, too."""
        real = f"{name}.real"
        if real not in self.read:
            self.read.add(real)
            self._node("DequantizeLinear", [name, *self.scales[name]], real)
        return real

    def _shaped(self, name: str, shape: Shape) -> str:
        """What a value stands for, as a map or as a vector: a map of one pixel is its channels."""
        real, own = self._real(name), self.shapes[name]
        if own == shape:
            return real
        if len(shape) == 1:
            return self._node("Flatten", [real], f"{name}.vector.{len(self.nodes)}", axis=1)
        pixel = self._constant("pixel", np.array([2, 3], np.int64))
        return self._node("Unsqueeze", [real, pixel], f"{name}.map.{len(self.nodes)}")

    def _end(self, step: Step, real: str) -> None:
        for out in step.outs:
            if isinstance(step, MaxPool):  # the largest of integers within their bounds
                self._quantized(out, real, self.scales[step.x], UINT8)
            elif out in self.graph.grids:
                grid = self.graph.grids[out]
                low, high = _bounds(grid, step.activation)
                scale = self._constant(f"{out}.scale", np.array(grid.scale, np.float32))
                zero_point = self._constant(f"{out}.zero_point", np.array(grid.zero_point - low, np.uint8))
                self._quantized(out, real, [scale, zero_point], high - low)
            else:
                self._node("Flatten", [self._activated(step, real)], out, axis=1)

    def _quantized(self, name: str, real: str, scale: list[str], most: int) -> None:
        """`name`, integers in [0, most]."""
        self.scales[name] = scale
        rounded = self._node("QuantizeLinear", [real, *scale], name if most == UINT8 else f"{name}.rounded")
        if most != UINT8:  # not of real numbers: ONNX Runtime keeps a convolution in front of these in floating point
            limit = self._constant(f"{name}.most", np.array(most, np.uint8))
            self._node("Clip", [rounded, "", limit], name)

    def _activated(self, step: Step, real: str) -> str:
        """Logits, which no grid bounds."""
        if step.activation is None:
            return real
        bounds = [self._constant("zero", np.array(0, np.float32))]
        if step.activation == "relu6":
            bounds.append(self._constant("six", np.array(6, np.float32)))
        elif step.activation != "relu":
            raise ExportError(f"export: an activation must have an ONNX form, got {step.activation}")
        return self._node("Clip", [real, *bounds], f"{step.outs[0]}.{step.activation}")

    def _total(self, step: Step) -> str:
        out = f"{step.outs[0]}.total"
        if isinstance(step, Quantize):
            return IMAGES
        if isinstance(step, Layer):
            return self._layer(step, out)
        x = self._real(step.x)
        if isinstance(step, Rescale):
            return self._rescale(step, x, out)
        if isinstance(step, Add):
            return self._node("Add", [x, self._shaped(step.other, self.shapes[step.x])], out)
        if isinstance(step, AveragePool):
            return self._average_pool(step, x, out)
        if isinstance(step, MaxPool):
            window = {"kernel_shape": step.kernel, "strides": step.stride, "dilations": step.dilation}
            return self._node("MaxPool", [x], out, **window, pads=self._pool_pads(step))
        raise ExportError(f"export: a step must have an ONNX form, got a {type(step).__name__}")

    def _pool_pads(self, step: MaxPool) -> list[int]:
        """Begins and ends; the ends make as many windows as torch does, whose ceil_mode is not ONNX's."""
        before, after = self.shapes[step.x][1:], self.shapes[step.outs[0]][1:]
        ends = [
            max(0, (count - 1) * s + (k - 1) * d + 1 - side - p)
            for side, count, k, s, p, d in zip(
                before, after, step.kernel, step.stride, step.padding, step.dilation, strict=True
            )
        ]
        return [*step.padding, *ends]

    def _layer(self, step: Layer, out: str) -> str:
        channels = _channels(step, self.graph)
        parameters = [self._constant(f"{out}.weight_scale", channels.scale),
                      self._constant(f"{out}.weight_zero_point", np.zeros(len(channels.scale), np.int8))]  # fmt: skip
        at_once = step.residual is None and channels.moved <= self.most_moved  # sums, bias and rounding in one
        if step.weight.dim() == 2 or (_of_pixels(step) and not at_once):
            total = self._matmul(step, channels, parameters, out)
        else:
            total = self._convolution(step, channels, parameters, out, inside=at_once or step.residual is not None)
        if step.residual is not None:
            total = self._node("Add", [total, self._shaped(step.residual, self.shapes[step.outs[0]])], out)
        return total

    def _convolution(self, step: Layer, channels: _Channels, parameters: list[str], out: str, inside: bool) -> str:
        """Sums and bias; `inside`: the bias is the convolution's, and whoever rounds its result may round it, too."""
        weight = self._constant(f"{out}.weight", channels.weight)
        real = self._node("DequantizeLinear", [weight, *parameters], f"{out}.real_weight", axis=0)
        window = {"kernel_shape": step.weight.shape[2:], "strides": step.stride, "dilations": step.dilation,
                  "pads": [*step.padding, *step.padding], "group": step.groups}  # fmt: skip
        if inside:
            bias = self._constant(f"{out}.bias", channels.bias)
            total = self._node("Conv", [self._real(step.x), real, bias], f"{out}.sums", **window)
        else:
            total = self._node("Conv", [self._real(step.x), real], f"{out}.sums", **window)
            total = self._biased(total, channels.bias.view(-1, 1, 1), out)
        return self._turned(total, channels.sign.view(-1, 1, 1), out)

    def _matmul(self, step: Layer, channels: _Channels, parameters: list[str], out: str) -> str:
        """A linear layer, or a convolution of single pixels, which ONNX Runtime multiplies as integers though its sums
        are not rounded; it does so with no convolution."""
        weight = self._constant(f"{out}.weight", channels.weight.flatten(1).T)
        real = self._node("DequantizeLinear", [weight, *parameters], f"{out}.real_weight", axis=1)
        x, linear = step.x, step.weight.dim() == 2
        if not linear:
            x = self._node("Transpose", [x], f"{out}.pixels", perm=[0, 2, 3, 1])
        elif len(self.shapes[x]) > 1:
            x = self._node("Flatten", [x], f"{out}.flat", axis=1)
        pixels = self._node("DequantizeLinear", [x, *self.scales[step.x]], f"{out}.real")
        total = self._node("Gemm" if linear else "MatMul", [pixels, real], f"{out}.sums")
        total = self._turned(self._biased(total, channels.bias, out), channels.sign, out)
        return total if linear else self._node("Transpose", [total], f"{out}.map", perm=[0, 3, 1, 2])

    def _biased(self, total: str, bias: Tensor, out: str) -> str:
        return self._node("Add", [total, self._constant(f"{out}.bias", bias)], f"{out}.biased")

    def _turned(self, total: str, sign: Tensor, out: str) -> str:
        if bool((sign > 0).all()):
            return total
        return self._node("Mul", [total, self._constant(f"{out}.sign", sign)], f"{out}.turned")

    def _rescale(self, step: Rescale, x: str, out: str) -> str:
        if step.mean is None or step.mult is None or step.bias is None:
            return x
        axes = [-1, *[1] * (len(self.shapes[step.x]) - 1)]
        for kind, values in (("Sub", step.mean), ("Mul", step.mult), ("Add", step.bias)):
            name = out if kind == "Add" else f"{out}.{kind.lower()}"
            x = self._node(kind, [x, self._constant(f"{out}.{kind}", values.view(axes))], name)
        return x

    def _average_pool(self, step: AveragePool, x: str, out: str) -> str:
        kernel, stride, padding = step.kernel, step.stride, step.padding
        if kernel is None:
            shape: Shape = self.shapes[step.x][1:]
            if any(side % parts for side, parts in zip(shape, step.output, strict=True)):
                raise ExportError(f"export: pools in ONNX must have equal windows, got {shape} to {step.output}")
            kernel = stride = (shape[0] // step.output[0], shape[1] // step.output[1])
            padding = (0, 0)
        return self._node("AveragePool", [x], out, kernel_shape=kernel, strides=stride, pads=[*padding, *padding],
                          count_include_pad=1)  # fmt: skip


def _bounds(grid: Grid, activation: str | None) -> tuple[int, int]:
    """The integers that a grid and an activation leave: rounding keeps the order, so it may come first."""
    low, high = grid.quant_min, grid.quant_max
    if activation is None:
        return low, high
    low = max(low, grid.zero_point)
    if activation == "relu":
        return low, high
    if activation == "relu6":
        six = torch.tensor(6.0) * grid.inverse + grid.zero_point  # as the engine rounds it, in fp32
        return low, min(high, int(six.round().clamp(low, high)))
    raise ExportError(f"export: an activation must have an ONNX form, got {activation}")


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
    if grid is None or len(step.outs) > 1 or step.residual is not None:  # its convolution stays in floating point
        return most, bias, 0.0
    low, high = _bounds(grid, step.activation)
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
