"""Integer networks as ONNX: QuantizeLinear and DequantizeLinear around float operators, for other runtimes.

Scales and zero points are the network's own. The arithmetic is ONNX's, which differs from `dfq.engine.graph` in this:

- QuantizeLinear divides by the scale where the engine multiplies by its reciprocal, and adds the zero point behind the
  rounding where the engine adds it before: a value at a tie may land on the neighbour;
- a layer's `mult` is split into the input's scale and a weight scale, and a runtime may apply them in another order;
- grids of fewer than 8 bits are a Max and a Min before an 8-bit QuantizeLinear: weights and activations take 8 bits;
- ONNX Runtime, optimising, rounds a layer's bias to the grid of its accumulators.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from dfq.checkpoint import write_atomic
from dfq.engine.check import Shape, check_graph
from dfq.engine.graph import IMAGES, Add, AveragePool, Grid, IntegerGraph, Layer, MaxPool, Quantize, Rescale, Step
from dfq.errors import first_line
from dfq.export import ExportError

OPSET, IR_VERSION = 17, 8


def save_onnx(graph: IntegerGraph, path: Path) -> None:
    """Writes the network as an ONNX file with one input, `images` [N, C, H, W], and one output, `logits`.

    Raises:
        ExportError: the package onnx is not installed, or an adaptive pool whose windows differ in size.
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

    def _grid(self, name: str, grid: Grid) -> list[str]:
        kind = np.int8 if grid.signed else np.uint8
        return [self._constant(f"{name}.scale", np.array(grid.scale, np.float32)),
                self._constant(f"{name}.zero_point", np.array(grid.zero_point, kind))]  # fmt: skip

    def _quantized(self, name: str, real: str) -> None:
        """`name` and what it stands for, `name.real`."""
        grid = self.graph.grids[name]
        if grid.bits < 8:  # not a Clip: ONNX Runtime 1.32 drops one that is narrower than the 8 bits behind it
            for kind, bound in (("Max", grid.quant_min), ("Min", grid.quant_max)):
                limit = np.float32(grid.scale) * np.array(bound - grid.zero_point, np.float32)
                real = self._node(kind, [real, self._constant(f"{name}.{kind}", limit)], f"{name}.{kind.lower()}")
        parameters = self._grid(name, grid)
        self._node("QuantizeLinear", [real, *parameters], name)
        self._node("DequantizeLinear", [name, *parameters], f"{name}.real")

    def _end(self, step: Step, real: str) -> None:
        first = step.outs[0]
        if step.activation is not None:
            real = self._node("Relu", [real], f"{first}.relu")
        if step.activation == "relu6":
            six = self._constant(f"{first}.six", np.array(6, np.float32))
            real = self._node("Min", [real, six], f"{first}.relu6")
        for out in step.outs:
            if out in self.graph.grids:
                self._quantized(out, real)
            else:
                self._node("Flatten", [real], out, axis=1)

    def _total(self, step: Step) -> str:
        out, x = f"{step.outs[0]}.total", IMAGES if isinstance(step, Quantize) else f"{step.x}.real"
        if isinstance(step, Layer):
            return self._layer(step, x, out)
        if isinstance(step, Rescale):
            return self._rescale(step, x, out)
        if isinstance(step, Add):
            return self._node("Add", [x, f"{step.other}.real"], out)
        if isinstance(step, AveragePool):
            return self._average_pool(step, x, out)
        if isinstance(step, MaxPool):
            window = {"kernel_shape": step.kernel, "strides": step.stride, "dilations": step.dilation}
            return self._node("MaxPool", [x], out, **window, pads=self._pool_pads(step))
        if isinstance(step, Quantize):
            return self._node("Identity", [x], out)
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

    def _layer(self, step: Layer, x: str, out: str) -> str:
        scale = step.mult.double() / self.graph.grids[step.x].scale
        axes = step.weight.dim()
        # a batch norm may turn a channel around; runtimes want scales above 0
        turned = (scale < 0) & (step.weight.flatten(1).amin(1) > -128)
        sign = 1 - 2 * turned.to(step.weight.dtype)
        integers = step.weight * sign.view(-1, *[1] * (axes - 1))
        weight = self._constant(f"{out}.weight", integers)
        parameters = [self._constant(f"{out}.weight_scale", (scale * sign).float()),
                      self._constant(f"{out}.weight_zero_point", np.zeros(len(scale), np.int8))]  # fmt: skip
        real = self._node("DequantizeLinear", [weight, *parameters], f"{out}.real_weight", axis=0)
        bias = self._constant(f"{out}.bias", step.bias)
        name = out if step.residual is None else f"{out}.layer"
        if axes == 2:
            flat = self._node("Flatten", [x], f"{out}.flat", axis=1)
            self._node("Gemm", [flat, real, bias], name, transB=1)
        else:
            window = {"kernel_shape": step.weight.shape[2:], "strides": step.stride, "dilations": step.dilation}
            pads = [*step.padding, *step.padding]
            self._node("Conv", [x, real, bias], name, **window, pads=pads, group=step.groups)
        if step.residual is not None:
            self._node("Add", [name, f"{step.residual}.real"], out)
        return out

    def _rescale(self, step: Rescale, x: str, out: str) -> str:
        if step.mean is None or step.mult is None or step.bias is None:
            return self._node("Identity", [x], out)
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
