"""Activations and functions of one argument in ONNX's operators; a table is looked up where its function is not known,
or where a runtime that computes the function with another last digit may round to another integer: all elements of this
argument would differ, and of 256 arguments each has some 0.4 % of the elements.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dfq.engine.graph import Table
from dfq.export.onnx_nodes.values import Writer
from dfq.layers.tail import activate
from dfq_kernels.activations import activation_of
from dfq_kernels.integers import Grid

LAST_DIGITS = 2.0**-20  # what runtimes' functions are off by, of the result
CLOSE = 1e-5  # of a table to its function: it holds what the function gives in fp32
Function = tuple[Callable[[Tensor], Tensor], Callable[[Writer, str, str], str]]


def activated(writer: Writer, real: str, activation: str | None, out: str, *, clamps: bool) -> str:
    """What an activation makes of real numbers; clamps: whether those that are bounds are computed, too."""
    known = activation_of(activation)
    if known.bounds is not None:
        low, high = known.bounds
        if not clamps or (math.isinf(low) and math.isinf(high)):
            return real
        names = [
            "" if math.isinf(to) else writer.constant(f"{out}.{end}", np.array(to, np.float32))
            for end, to in (("least", low), ("most", high))
        ]
        return writer.node("Clip", [real, *names][: 3 if names[1] else 2], out)
    if known.name == "leaky_relu":
        return writer.node("LeakyRelu", [real], out, alpha=known.a)
    return _FUNCTIONS[str(known.name)][1](writer, real, out)


def table(writer: Writer, step: Table, out: str) -> str:
    """`t` of a table step: its function where ONNX has it and the table holds nothing else."""
    if _is_function(writer, step):
        return _FUNCTIONS[step.function][1](writer, writer.real(step.x), out)
    return _looked_up(writer, step, step.values, out)


def integer_table(writer: Writer, step: Table) -> bool:
    """Writes the integers of a table step as tables of integers, unless its function gives the same ones everywhere."""
    reals, grids = activate(step.values, step.activation), [writer.graph.grids[out] for out in step.outs]
    x = writer.graph.grids[step.x]
    if _is_function(writer, step) and not any(near_tie(reals, reals_of(x), grid) for grid in grids):
        return False
    for out, grid in zip(step.outs, grids, strict=True):
        _looked_up(writer, step, (on_grid(reals, grid) - writer.lowest[out]).to(torch.uint8), out)
    return True


def reals_of(grid: Grid) -> Tensor:
    """What the integers of a grid stand for, float64."""
    return (torch.arange(grid.quant_min, grid.quant_max + 1).double() - grid.zero_point) * grid.scale


def on_grid(reals: Tensor, grid: Grid) -> Tensor:
    """The integers of fp32 numbers, as the engine rounds them."""
    return torch.round(reals * grid.inverse + grid.zero_point).clamp(grid.quant_min, grid.quant_max)


def near_tie(reals: Tensor, of: Tensor, grid: Grid) -> bool:
    """Whether a function with another last digit, or a rounding in another order, may give another integer.

    Args:
        reals: the function's values; of: its arguments.
        grid: of the result.
    """
    steps = reals.double() / grid.scale + grid.zero_point
    error = (LAST_DIGITS * reals.double().abs() + of.abs() * 2.0**-24) / grid.scale + 2.0**-22 * steps.abs()
    inside = (steps > grid.quant_min - 1) & (steps < grid.quant_max + 1)
    return bool((inside & (((steps - steps.floor()) - 0.5).abs() <= error)).any())


def _is_function(writer: Writer, step: Table) -> bool:
    known = _FUNCTIONS.get(step.function)
    if known is None:
        return False
    exact = known[0](reals_of(writer.graph.grids[step.x]))
    return torch.allclose(step.values.double(), exact, rtol=CLOSE, atol=CLOSE)


def _looked_up(writer: Writer, step: Table, values: Tensor, out: str) -> str:
    values = values[writer.lowest[step.x] - writer.graph.grids[step.x].quant_min :]
    place = writer.node("Cast", [step.x], f"{out}.place", to=writer.onnx.TensorProto.INT32)
    return writer.node("Gather", [writer.constant(f"{out}.values", values), place], out, axis=0)


def _operator(kind: str, **attributes: float) -> Callable[[Writer, str, str], str]:
    return lambda writer, x, out: writer.node(kind, [x], out, **attributes)


def _number(writer: Writer, value: float) -> str:
    """A scalar, whose name is its value."""
    return writer.constant(f"number.{value!r}", np.array(value, np.float32))


def _gated(kind: str) -> Callable[[Writer, str, str], str]:
    """`x * kind(x)`."""
    return lambda writer, x, out: writer.node("Mul", [x, writer.node(kind, [x], f"{out}.gate")], out)


def _mish(writer: Writer, x: str, out: str) -> str:
    inner = writer.node("Tanh", [writer.node("Softplus", [x], f"{out}.softplus")], f"{out}.gate")
    return writer.node("Mul", [x, inner], out)


def _log_sigmoid(writer: Writer, x: str, out: str) -> str:
    """`-softplus(-x)`."""
    turned = writer.node("Softplus", [writer.node("Neg", [x], f"{out}.negative")], f"{out}.softplus")
    return writer.node("Neg", [turned], out)


def _gelu(writer: Writer, x: str, out: str) -> str:
    """`0.5 * x * (1 + erf(x / sqrt(2)))`."""
    scaled = writer.node("Mul", [x, _number(writer, math.sqrt(0.5))], f"{out}.scaled")
    return _half(writer, x, writer.node("Erf", [scaled], f"{out}.erf"), out)


def _gelu_tanh(writer: Writer, x: str, out: str) -> str:
    """`0.5 * x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x^3)))`."""
    square = writer.node("Mul", [x, x], f"{out}.square")
    inner = writer.node("Mul", [square, _number(writer, 0.044715)], f"{out}.share")
    inner = writer.node("Add", [inner, _number(writer, 1.0)], f"{out}.factor")
    inner = writer.node("Mul", [x, inner], f"{out}.sum")
    inner = writer.node("Mul", [inner, _number(writer, math.sqrt(2 / math.pi))], f"{out}.scaled")
    return _half(writer, x, writer.node("Tanh", [inner], f"{out}.tanh"), out)


def _half(writer: Writer, x: str, inner: str, out: str) -> str:
    """`x * (1 + inner) * 0.5`."""
    more = writer.node("Add", [inner, _number(writer, 1.0)], f"{out}.more")
    whole = writer.node("Mul", [x, more], f"{out}.whole")
    return writer.node("Mul", [whole, _number(writer, 0.5)], out)


# name -> what it is in float64, and in ONNX
_FUNCTIONS: dict[str, Function] = {
    "hardsigmoid": (F.hardsigmoid, _operator("HardSigmoid", alpha=1 / 6, beta=0.5)),
    "hardswish": (F.hardswish, _operator("HardSwish")),
    "sigmoid": (torch.sigmoid, _operator("Sigmoid")),
    "silu": (F.silu, _gated("Sigmoid")),
    "tanh": (torch.tanh, _operator("Tanh")),
    "gelu": (F.gelu, _gelu),
    "gelu_tanh": (lambda t: F.gelu(t, approximate="tanh"), _gelu_tanh),
    "elu": (F.elu, _operator("Elu", alpha=1.0)),
    "selu": (F.selu, _operator("Selu")),
    "softplus": (F.softplus, _operator("Softplus")),
    "celu": (F.celu, _operator("Celu", alpha=1.0)),
    "log_sigmoid": (F.logsigmoid, _log_sigmoid),
    "softsign": (F.softsign, _operator("Softsign")),
    "mish": (F.mish, _mish),
    "sin": (torch.sin, _operator("Sin")),
    "cos": (torch.cos, _operator("Cos")),
    "exp": (torch.exp, _operator("Exp")),
    "abs": (torch.abs, _operator("Abs")),
    "square": (torch.square, lambda writer, x, out: writer.node("Mul", [x, x], out)),
}
