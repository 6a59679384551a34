"""Layers in ONNX: sums of int8 weights, their bias, and what is added to them."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from dfq.engine.graph import Layer, as_map
from dfq.export.onnx_nodes.channels import Channels, channels
from dfq.export.onnx_nodes.values import Writer
from dfq.layers.weighted import lies_on_accumulators


def layer(writer: Writer, step: Layer, out: str) -> str:
    """`t` of a layer."""
    made = channels(step.weight, step.mult, step.bias, writer.graph.grids[step.x], step.name)
    parameters = [writer.constant(f"{out}.weight_scale", made.scale),
                  writer.constant(f"{out}.weight_zero_point", np.zeros(len(made.scale), np.int8))]  # fmt: skip
    at_once = step.residual is None and lies_on_accumulators(step.bias, step.mult)  # sums, bias, rounding in one
    if step.weight.dim() == 2 or (_of_pixels(step) and not at_once):
        total = _matmul(writer, step, made, parameters, out)
    else:
        inside = at_once or step.residual is not None
        total = _convolution(writer, step, made, parameters, out, inside=inside)
    if step.residual is not None:
        total = writer.node("Add", [total, writer.real(step.residual, writer.shapes[step.outs[0]])], out)
    return total


def _convolution(writer: Writer, step: Layer, made: Channels, parameters: list[str], out: str, inside: bool) -> str:
    """Sums and bias; `inside`: the bias is the convolution's, and whoever rounds its result may round it, too."""
    weight = writer.constant(f"{out}.weight", made.weight)
    real = writer.node("DequantizeLinear", [weight, *parameters], f"{out}.real_weight", axis=0)
    window = {"kernel_shape": step.weight.shape[2:], "strides": step.stride, "dilations": step.dilation,
              "pads": [*step.padding, *step.padding], "group": step.groups}  # fmt: skip
    x = writer.real(step.x, as_map(writer.shapes[step.x]))
    if inside:
        bias = writer.constant(f"{out}.bias", made.bias)
        total = writer.node("Conv", [x, real, bias], f"{out}.sums", **window)
    else:
        total = writer.node("Conv", [x, real], f"{out}.sums", **window)
        total = _biased(writer, total, made.bias.view(-1, 1, 1), out)
    return _turned(writer, total, made.sign.view(-1, 1, 1), out)


def _matmul(writer: Writer, step: Layer, made: Channels, parameters: list[str], out: str) -> str:
    """A linear layer, or a convolution of single pixels, which ONNX Runtime multiplies as integers though its sums
    are not rounded; it does so with no convolution."""
    weight = writer.constant(f"{out}.weight", made.weight.flatten(1).T)
    real = writer.node("DequantizeLinear", [weight, *parameters], f"{out}.real_weight", axis=1)
    x, linear = step.x, step.weight.dim() == 2
    if not linear:
        x = writer.node("Transpose", [writer.integers(x, as_map(writer.shapes[x]))], f"{out}.pixels", perm=[0, 2, 3, 1])
    elif len(writer.shapes[x]) > 1:
        x = writer.node("Flatten", [x], f"{out}.flat", axis=1)
    pixels = writer.node("DequantizeLinear", [x, *writer.grid_of(step.x)], f"{out}.real")
    total = writer.node("Gemm" if linear else "MatMul", [pixels, real], f"{out}.sums")
    total = _turned(writer, _biased(writer, total, made.bias, out), made.sign, out)
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
