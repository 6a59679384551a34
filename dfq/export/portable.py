"""A quantized network as plain torch operators, for torch's own ONNX exporter: it translates whatever stays in floating
point, and quantizers are QuantizeLinear and DequantizeLinear."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.ao.quantization.fx import _decomposed  # noqa: F401  (its operators are what the exporter knows)
from torch.nn import functional as F

from dfq.errors import first_line
from dfq.export.items import ExportError, check_fixed, grid_of, integer_weight
from dfq.export.onnx_nodes.channels import channels
from dfq.export.onnx_nodes.functions import near_tie, on_grid, reals_of
from dfq.layers.kind import Layer, per_channel
from dfq.layers.tail import Tail, activate
from dfq.layers.weighted import QuantLayer, on_accumulators
from dfq.quant.exactness import input_quantizers, quantizer_of
from dfq.quant.quantizers import ActivationQuantizer, WeightQuantizers, weight_layers
from dfq.running.checkpoint import write_atomic
from dfq_kernels.integers import Grid

OPSET = 20
UINT8 = 0, 255, torch.uint8  # all values: ONNX Runtime's integer kernels on x86 know no int8 ones


class Portable(nn.Module):
    """Runs a quantized network, call by call.

    Args:
        student: of `prepare`, with fixed ranges.
    """

    def __init__(self, student: fx.GraphModule) -> None:
        super().__init__()
        check_fixed(student)
        self.student = student.eval()
        quantizers = [module for module in student.modules() if isinstance(module, ActivationQuantizer)]
        self.grids = {id(module): grid_of(module) for module in quantizers}
        self.folded: dict[int, str] = {}  # a layer's id: its bias, with the batch norm in it
        self.turned: dict[int, str] = {}  # a layer's id: what multiplies its channels, where one is turned around
        self.weights = self._weights()
        for index, (integers, scale) in enumerate(self.weights):
            self.register_buffer(f"integers_{index}", integers)
            self.register_buffer(f"scale_{index}", scale)
        self.tables = self._tables()

    @torch.no_grad()
    def _tables(self) -> dict[int, tuple[str, Grid]]:
        """By a table's id the buffer of what its integers become, and its argument's grid; only of those that another
        runtime's function may round to other integers."""
        found: dict[int, tuple[str, Grid]] = {}
        for node in self.student.graph.nodes:
            layer: Any = self.student.get_submodule(str(node.target)) if node.op == "call_module" else None
            if not isinstance(layer, Layer) or len(node.args) != 2 or layer.tail.quantizer is None:
                continue
            if (step := quantizer_of(node.args[1], self.student)) is None:
                continue
            grid, onto = self.grids[id(step)], self.grids[id(layer.tail.quantizer)]
            if (reals := layer.table(grid)) is None:
                continue
            reals = activate(reals, layer.tail.activation)
            if near_tie(reals, reals_of(grid), onto):
                found[id(layer)] = f"table_{len(found)}", grid
                self.register_buffer(found[id(layer)][0], (on_grid(reals, onto) - onto.zero_point) * onto.scale)
        return found

    @torch.no_grad()
    def _weights(self) -> list[tuple[Tensor, Tensor]]:
        """Every layer's integers and scales; where its input is quantized, its batch norm is in them."""
        found, inputs = [], input_quantizers(self.student)
        for index, (name, quantizer, weight) in enumerate(weight_layers(self.student)):
            layer: Any = self.student.get_submodule(name)
            integers, scale = integer_weight(name, quantizer, weight.detach())
            mult, bias = layer.tail.constants(layer.bias, scale)
            if (step := inputs[name]) is not None:
                mult = step.scale * mult
                made = channels(integers, mult, on_accumulators(bias, mult), self.grids[id(step)], name)
                self.folded[id(layer)] = f"bias_{index}"
                self.register_buffer(f"bias_{index}", made.bias)
                if bool((made.sign < 0).any()):
                    self.turned[id(layer)] = f"sign_{index}"
                    self.register_buffer(f"sign_{index}", made.sign)
                integers, scale = made.weight, made.scale
            found.append((integers.to(torch.int8), scale.clone()))
        return found

    def forward(self, images: Tensor) -> Any:
        values: dict[fx.Node, Any] = {}
        for node in self.student.graph.nodes:
            if node.op == "output":
                return fx.map_arg(node.args[0], lambda item: values[item])
            arguments = fx.map_arg(node.args, lambda item: values[item])
            keywords = fx.map_arg(node.kwargs, lambda item: values[item])
            values[node] = self._call(node, images, arguments, keywords)
        raise AssertionError("a graph ends in its output")

    def _call(self, node: fx.Node, images: Tensor, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        if node.op == "placeholder":
            return images
        if node.op == "get_attr":
            found: Any = self.student
            for name in str(node.target).split("."):
                found = getattr(found, name)
            return found
        if node.op == "call_method":
            return getattr(arguments[0], str(node.target))(*arguments[1:], **keywords)
        if node.op == "call_function":
            return node.target(*arguments, **keywords)  # type: ignore[operator]
        return self._module(self.student.get_submodule(str(node.target)), arguments)

    def _module(self, module: nn.Module, arguments: tuple[Any, ...]) -> Any:
        if isinstance(module, WeightQuantizers):
            return [self._weight(index) for index in range(len(self.weights))]
        if isinstance(module, ActivationQuantizer):
            return self._rounded(module, arguments[0])
        if isinstance(module, QuantLayer):
            x, _, weight, _ = arguments
            if id(module) in self.folded:
                sums = module.accumulate(x, weight, getattr(self, self.folded[id(module)]))
                if id(module) in self.turned:
                    sign = getattr(self, self.turned[id(module)])
                    sums = sums * per_channel(sign, sums, module.channel_axis % sums.dim())
                return self._finished(module.tail, sums)
            return self._ended(module.tail, module.accumulate(x, weight, module.bias))
        if id(module) in self.tables:
            name, grid = self.tables[id(module)]
            place = torch.round(arguments[0] / grid.scale).to(torch.int64) + (grid.zero_point - grid.quant_min)
            found: Any = module.tail
            return self._rounded(found.quantizer, getattr(self, name)[place])
        if isinstance(module, Layer):
            return self._ended(module.tail, module.compute(*arguments))
        return module(*arguments)

    def _weight(self, index: int) -> tuple[Tensor, Tensor]:
        integers, scale = getattr(self, f"integers_{index}"), getattr(self, f"scale_{index}")
        real = torch.ops.quantized_decomposed.dequantize_per_channel(
            integers, scale, torch.zeros_like(scale, dtype=torch.int64), 0, -128, 127, torch.int8
        )
        return real, scale

    def _ended(self, tail: Tail, x: Tensor) -> Any:
        """Batch norm, activation and quantizer."""
        if tail.bn is not None:
            norm = tail.bn
            x = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
        return self._finished(tail, x)

    def _finished(self, tail: Tail, x: Tensor) -> Any:
        """Activation and quantizer."""
        x = activate(x, tail.activation)
        return x if tail.quantizer is None else self._rounded(tail.quantizer, x)

    def _rounded(self, quantizer: ActivationQuantizer, x: Tensor) -> tuple[Tensor, Tensor]:
        """To a grid and back, of 8 bits or fewer: bounds are put before the rounding."""
        grid = self.grids[id(quantizer)]
        lowest = -128 if grid.signed else 0
        if (grid.quant_min - lowest, grid.quant_max - lowest) != UINT8[:2]:
            ends = ((end - grid.zero_point) * grid.scale for end in (grid.quant_min, grid.quant_max))
            x = x.clamp(*ends)
        calls, onto = torch.ops.quantized_decomposed, (grid.scale, grid.zero_point - lowest, *UINT8)
        return calls.dequantize_per_tensor(calls.quantize_per_tensor(x, *onto), *onto), quantizer.scale


def save_portable(student: fx.GraphModule, input_shape: tuple[int, ...], path: Path) -> None:
    """Writes a network with parts in floating point as ONNX, by torch's exporter.

    Raises:
        ExportError: onnxscript is not installed, or a call without an ONNX form.
        CheckpointError: the file cannot be written.
    """
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        rule = "the packages onnx and onnxscript must be installed for a network with parts in floating point"
        raise ExportError(f"export: {rule} (pip install onnx onnxscript), got none") from error
    images = torch.zeros(2, *input_shape)
    batch = torch.export.Dim("N", min=1)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # torch's, on its own internals
            program = torch.onnx.export(
                Portable(student), (images,), dynamo=True, input_names=["images"], opset_version=OPSET,
                dynamic_shapes=({0: batch},), verbose=False, external_data=False,
            )  # fmt: skip
            assert program is not None
            data = program.model_proto.SerializeToString()
    except Exception as error:  # its errors are Exceptions of several modules
        raise ExportError(f"export: every call must have an ONNX form, got {_reason(error)}") from error
    write_atomic(path, data)


def _reason(error: BaseException) -> str:
    """The line that names what was not translated: the exporter's own first lines say how to report a bug."""
    found: BaseException | None = error
    lines: list[str] = []
    while found is not None:
        lines.append(f"{type(found).__name__}: {first_line(found)}")
        found = found.__cause__
    return lines[-1]
