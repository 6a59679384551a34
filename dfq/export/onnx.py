"""Integer networks as ONNX: QuantizeLinear and DequantizeLinear around float operators, for other runtimes.

Scales of values are the network's own. Every value is uint8: its integers are the network's less the lowest one that
its grid and its activation leave, so that rounding to 8 bits bounds them below; a Clip of the integers bounds them
above where that is under 255. ReLU, other clamps and grids of fewer bits are these bounds, and no operator of their
own. Moves work on these integers. No sum is rounded that the network does not round: what is added to a layer's sums is
added to real numbers. The arithmetic is ONNX's, which differs from `dfq.engine.graph` in this:

- QuantizeLinear divides by the scale where the engine multiplies by its reciprocal, and adds the zero point after the
  rounding where the engine adds it before: a value at a tie may land on the neighbour;
- a function is computed where ONNX has it, not looked up; windows of pools that ONNX has not are summed in fp32;
- a layer's `mult` is split into the input's scale and a weight scale, and a runtime may apply them in another order;
- ONNX Runtime, optimising, adds a convolution's bias to the accumulators in int32. So does an exported student, whose
  biases lie on that grid (`dfq.layers.weighted.on_accumulators`). A layer of another network, with a bias between two
  of its steps, has an Add that ONNX Runtime does not round.

ONNX Runtime 1.32 then computes linear layers in integers, and every convolution whose sums one QuantizeLinear reads. It
does not where something is added to the sums, where the bias is such an Add, or where the activation is more than
bounds. In the first two cases a convolution of single pixels is a MatMul, whose real sums need no QuantizeLinear.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dfq.engine.check import Shape
from dfq.engine.graph import (
    IMAGES,
    Add,
    AveragePool,
    IntegerGraph,
    Layer,
    MaxPool,
    Move,
    Multiply,
    Output,
    Quantize,
    Rescale,
    Resize,
    Step,
    Table,
    as_map,
)
from dfq.errors import first_line
from dfq.export.items import ExportError
from dfq.export.onnx_nodes.functions import activated, integer_table, table
from dfq.export.onnx_nodes.layers import layer
from dfq.export.onnx_nodes.moves import move
from dfq.export.onnx_nodes.pools import average_pool, max_pool, resize
from dfq.export.onnx_nodes.values import Writer
from dfq.running.checkpoint import write_atomic

OPSET, IR_VERSION = 17, 8
FUNCTIONS = {"softmax": "Softmax", "log_softmax": "LogSoftmax"}


def save_onnx(graph: IntegerGraph, path: Path) -> None:
    """Writes the network as an ONNX file.

    Its input is `images` [N, *input_shape]. Its outputs are named by the structure of what the network returns: a
    dictionary's key, `output.0`, `output.1` of a list; `logits` of a classifier, `output` of any other tensor.

    Raises:
        ExportError: the package onnx is not installed, or weights whose scale is beyond fp32.
        CheckpointError: the file cannot be written.
    """
    try:
        import onnx
    except ImportError as error:
        rule = "the package onnx must be installed for an ONNX file (pip install onnx)"
        raise ExportError(f"export: {rule}, got none") from error
    model = _model(Writer(graph, onnx))
    try:
        onnx.checker.check_model(model, full_check=True)
    except Exception as error:  # its errors are Exceptions of several modules
        raise ExportError(f"export: the network must have an ONNX form, got {first_line(error)}") from error
    write_atomic(path, model.SerializeToString())


def output_names(graph: IntegerGraph) -> list[str]:
    """Of the network's outputs in ONNX, in the order of `graph.outputs`."""
    if graph.structure == 0 and len(graph.outputs) == 1:
        return ["logits" if graph.num_classes else "output"]
    found: dict[int, str] = {}

    def walk(part: Any, *path: str) -> None:
        if isinstance(part, dict):
            for key, inner in part.items():
                walk(inner, *path, key)
        elif isinstance(part, list):
            for index, inner in enumerate(part):
                walk(inner, *(path or ("output",)), str(index))
        else:
            found[part] = ".".join(path) or "output"

    walk(graph.structure)
    return [found[index] for index in range(len(graph.outputs))]


def _model(writer: Writer) -> Any:
    graph, helper, float32 = writer.graph, writer.onnx.helper, writer.onnx.TensorProto.FLOAT
    for step in graph.steps:
        _write(writer, step)
    names, taken = output_names(graph), {IMAGES, *graph.grids}
    for index, name in enumerate(names):  # beside a value of the same name
        while names[index] in taken:
            names[index] = f"{name}.output" if names[index] == name else f"{names[index]}.output"
        taken.add(names[index])
    for output, name in zip(graph.outputs, names, strict=True):
        _output(writer, output, name)
    images = helper.make_tensor_value_info(IMAGES, float32, ["N", *graph.input_shape])
    outputs = [
        helper.make_tensor_value_info(name, float32, ["N", *output.shape])
        for output, name in zip(graph.outputs, names, strict=True)
    ]
    made = helper.make_graph(writer.nodes, "integer_network", [images], outputs, list(writer.constants.values()))
    opsets = [helper.make_opsetid("", OPSET)]
    return helper.make_model(made, producer_name="dfq-kernels", opset_imports=opsets, ir_version=IR_VERSION)


def _write(writer: Writer, step: Step) -> None:
    """A step's results: integers by their names, real numbers as `<name>.t`."""
    if isinstance(step, Move):
        move(writer, step)
        return
    if isinstance(step, MaxPool):
        max_pool(writer, step)
        return
    first = step.outs[0]
    real = first not in writer.graph.grids
    if isinstance(step, Table) and not real and integer_table(writer, step):
        return
    total = activated(
        writer, _total(writer, step, f"{first}.total"), step.activation, f"{first}.activated", clamps=real
    )
    if real:
        writer.reals[first] = total
        return
    for out in step.outs:
        writer.quantized(out, total, step.activation)


def _total(writer: Writer, step: Step, out: str) -> str:
    """`t` of a step, before its activation."""
    if isinstance(step, Quantize):
        whole = as_map(writer.graph.input_shape)
        return IMAGES if writer.graph.input_shape == whole else writer.reshaped(IMAGES, whole, out)
    if isinstance(step, Layer):
        return layer(writer, step, out)
    if isinstance(step, Rescale):
        return _rescale(writer, step, out)
    if isinstance(step, Table):
        return table(writer, step, out)
    if isinstance(step, (Add, Multiply)):
        x = writer.shapes[step.x]
        other = as_map(writer.shapes[step.other])
        shape: Shape = other if len(x) == 3 else other[:1]  # a vector's other side has one pixel
        kind = "Add" if isinstance(step, Add) else "Mul"
        return writer.node(kind, [writer.real(step.x), writer.real(step.other, shape)], out)
    if isinstance(step, AveragePool):
        return average_pool(writer, step, out)
    if isinstance(step, Resize):
        return resize(writer, step, out)
    raise ExportError(f"export: a step must have an ONNX form, got a {type(step).__name__}")


def _rescale(writer: Writer, step: Rescale, out: str) -> str:
    x = writer.real(step.x)
    axes = [-1, *[1] * (len(writer.shapes[step.x]) - 1)]
    for kind, values in (("Sub", step.mean), ("Mul", step.mult), ("Add", step.bias), ("PRelu", step.slope)):
        if values is not None:
            name = f"{out}.{kind.lower()}"
            x = writer.node(kind, [x, writer.constant(f"{name}.by", values.view(axes))], name)
    return x


def _output(writer: Writer, output: Output, name: str) -> None:
    """Elements in their order and shape, and the function after them."""
    real, shape = writer.reals[output.value], writer.shapes[output.value]
    last = name if output.function is None else f"{name}.before"
    if output.order is not None:
        flat = writer.node("Flatten", [real], f"{name}.flat", axis=1)
        order = writer.constant(f"{name}.order", output.order.numpy().astype(np.int64))
        real, shape = writer.node("Gather", [flat, order], f"{name}.ordered", axis=1), (len(output.order),)
    real = writer.reshaped(real, output.shape, last) if shape != output.shape else real
    if output.function is not None:
        writer.node(FUNCTIONS[output.function], [real], name, axis=output.axis)
    elif real != name:
        writer.node("Identity", [real], name)
