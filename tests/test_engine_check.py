"""What is no network is refused, whatever is wrong with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from dfq.engine.check import check_graph
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
    Output,
    Quantize,
    Rescale,
    Resize,
    Step,
    Table,
)
from dfq.engine.rules import GraphError
from tests.engine_graphs import GRAPHS, residual_network

NAN = float("nan")


def with_step(graph: IntegerGraph, kind: type[Step], which: int = 0, **fields: Any) -> IntegerGraph:
    """The graph with one of its steps changed."""
    wanted = [step for step in graph.steps if isinstance(step, kind)][which]
    return replace(graph, steps=tuple(replace(step, **fields) if step is wanted else step for step in graph.steps))


def ints(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def check_all(cases: list[tuple[IntegerGraph, str]]) -> None:
    for wrong, text in cases:
        with pytest.raises(GraphError, match=text):
            check_graph(wrong)


def test_layers_and_graphs() -> None:
    graph = residual_network()
    check_graph(graph)
    layer = next(step for step in graph.steps if isinstance(step, Layer))
    changed: Callable[..., IntegerGraph] = lambda **fields: with_step(graph, Layer, **fields)  # noqa: E731
    grid = graph.grids[layer.x]
    check_all([
        (changed(x="nothing"), "an input must be a quantized value of an earlier step, got 'nothing'"),
        (changed(x=IMAGES), "an input must be a quantized value"),
        (changed(stride=(0, 1)), r"stride must be 2 integers in \[1, 65536\], got \(0, 1\)"),
        (changed(padding=(10**9, 0)), "padding must be 2 integers"),
        (changed(groups=2), "groups must be a divisor"),
        (changed(mult=layer.mult[:-1]), "mult must be float32"),
        (changed(bias=layer.bias.clone().fill_(NAN)), "bias must be at most 2\\^40"),
        (changed(bias=layer.bias.clone().fill_(2.0**41)), "bias must be at most 2\\^40"),
        (changed(weight_bits=2), "weight must be of 2 bits"),
        (changed(activation="gelu"), "activation must be None, relu, relu6"),
        (changed(activation="hardtanh(1,-1)"), "activation must be None"),
        (changed(activation="leaky_relu(1e30)"), "an activation's number must be at most 2\\^40"),
        (changed(residual=layer.x), "residual must be of shape"),
        (changed(outs=()), "outs must be 1 to 4 results"),
        (changed(outs=("a", "b")), "must be on grids, or a real one alone"),
        (changed(outs=(layer.outs[0], layer.outs[0])), "must be new names"),
        (replace(graph, grids=graph.grids | {layer.x: Grid(0.0, 0, 0, 255)}), "the scale of .* must be fp32 in"),
        (replace(graph, grids=graph.grids | {layer.x: Grid(1.0, 300, 0, 255)}), "zero point"),
        (replace(graph, grids=graph.grids | {layer.x: Grid(1.0, 0, 0, 300)}), "of 8 bits at most"),
        (replace(graph, grids=graph.grids | {IMAGES: grid}), "the images must be without a grid"),
        (replace(graph, steps=()), "steps must be at least one"),
        (replace(graph, input_shape=()), "input_shape must be 1 to 8 integers"),
        (replace(graph, input_shape=(3, 9, 0)), "input_shape must be"),
        (replace(graph, normalization=((0.0,), (1.0,))), "normalization must be a mean and a deviation"),
    ])  # fmt: skip


def test_sums_beyond_int32() -> None:
    """70,000 inputs of 255 with weights of 127, or of -128, whose magnitude is no int8."""
    for value, bound in ((127, 2266950000), (-128, 2284800000)):
        weight = torch.full((1, 70000), value, dtype=torch.int8)
        steps = (
            Quantize(IMAGES, ("x",), None),
            Layer("x", ("logits",), None, "l", weight, 8, torch.ones(1), torch.ones(1), None),
        )
        graph = IntegerGraph((7, 100, 100), {"x": Grid(1.0, 0, 0, 255)}, steps, (Output("logits", (1,)),))
        check_all([(graph, f"the largest sum must be below 2\\^31, got {bound}")])


def test_outputs() -> None:
    graph = GRAPHS["pyramid"]()
    mask, score, turned = graph.outputs
    changed: Callable[..., IntegerGraph] = lambda **fields: replace(  # noqa: E731
        graph, outputs=(replace(mask, **fields), score, turned)
    )
    order = turned.order
    assert order is not None
    check_all([
        (changed(value="v1"), "an output must be a result without a grid, got 'v1'"),
        (changed(value=IMAGES), "an output must be a result without a grid"),
        (changed(shape=(3, 8)), "an output's shape must be of 240 elements"),
        (changed(shape=(3, -8, -10)), "integers above 0"),
        (changed(function="argmax"), "function must be None, softmax or log_softmax"),
        (changed(axis=0), r"axis must be in \[1, 3\]"),
        (changed(axis=4), r"axis must be in \[1, 3\]"),
        (changed(order=order + 1), r"order must be in \[0, 240\)"),
        (changed(order=order - 1), r"order must be in \[0, 240\)"),
        (changed(order=order[:-1]), "order must be int64"),
        (changed(order=order.int()), "order must be int64"),
        (replace(graph, outputs=()), "outputs must be at least one"),
        (replace(graph, structure=[0, 1]), "structure must be of every output once, 0 to 2"),
        (replace(graph, structure=[0, 1, 2, 2]), "of every output once"),
        (replace(graph, structure=[0, 1, True]), "structure must be of lists, dicts and numbers"),
        (replace(graph, structure={1: [0, 1, 2]}), "the keys of structure must be text"),
    ])  # fmt: skip
    check_graph(changed(function=None, axis=0))
    check_graph(replace(graph, structure=[{"a": 2}, [[1], 0]]))


def test_tables_products_and_sums() -> None:
    graph = GRAPHS["squeeze"]()
    table = next(step for step in graph.steps if isinstance(step, Table))
    values = table.values.clone()
    values[3] = NAN
    check_all([
        (with_step(graph, Table, values=table.values[:-1]), r"table: values must be float32 \(256,\)"),
        (with_step(graph, Table, values=values), "table: values must be at most 2\\^40"),
        (with_step(graph, Table, values=table.values.double()), "table: values must be float32"),
        (with_step(graph, Table, function=3), "table: function must be text"),
        (with_step(graph, Multiply, scale=0.0), r"multiply: scale must be fp32 in \[2\^-126, 2\^64\]"),
        (with_step(graph, Multiply, scale=0.1), "multiply: scale must be fp32"),
        (with_step(graph, Multiply, scale=1), "multiply: scale must be fp32"),
        (with_step(graph, Multiply, other="v0"), "the other side of multiply must be of shape"),
        (with_step(graph, Add, other="v0"), "the other side of add must be of shape"),
        (with_step(graph, Rescale, slope=torch.ones(3)), "rescale: slope must be float32"),
        (with_step(graph, Rescale, mult=None), "must be given together"),
    ])  # fmt: skip


def test_moves() -> None:
    graph = GRAPHS["anywhere"]()
    padded = next(step for step in graph.steps if isinstance(step, Move))
    turned = [step for step in graph.steps if isinstance(step, Move)][1]
    assert padded.pixels is not None and turned.index is not None
    pixels, index = padded.pixels, turned.index
    joined: Callable[..., IntegerGraph] = lambda **fields: with_step(GRAPHS["dense"](), Move, **fields)  # noqa: E731
    check_all([
        (with_step(graph, Move, pixels=pixels + 1), r"move: pixels must be in \[-1, 36\), got \(0, 36\)"),
        (with_step(graph, Move, pixels=pixels - 1), r"move: pixels must be in \[-1, 36\)"),
        (with_step(graph, Move, pixels=pixels[:-1]), "move: pixels must be int32"),
        (with_step(graph, Move, pixels=pixels.long()), "move: pixels must be int32"),
        (with_step(graph, Move, fill=-129), r"move: fill must be in \[-128, 127\]"),
        (with_step(graph, Move, fill=1.0), "move: fill must be in"),
        (with_step(graph, Move, activation="relu"), "one without activation"),
        (with_step(graph, Move, shape=(8, 8)), "move: shape must be 3 integers"),
        (with_step(graph, Move, shape=(8, 8, 2**17)), "move: shape must be 3 integers"),
        (with_step(graph, Move, channels=ints(*range(1, 9))), r"move: channels must be in \[-1, 8\)"),
        (with_step(graph, Move, 1, index=index + 1), r"move: index must be in \[-1, 288\)"),
        (with_step(graph, Move, 1, index=index[:-1]), "move: index must be int32"),
        (with_step(graph, Move, 1, channels=ints(*range(6))), "index must be given without channels and pixels"),
        (joined(shape=(25, 7, 6)), "move: shape must be of 26 channels"),
        (joined(shape=(26, 6, 6)), r"move: shape must be of maps of \(7, 6\)"),
        (joined(others=()), "move: shape must be of 21 channels"),
        (joined(others=["v3"]), "move: others must be a tuple"),
        (joined(others=("v3",) * 512), "move: inputs must be at most 512"),
        (with_step(GRAPHS["inception"](), Move, others=("v0",)), "maps of one size|on the grid|channels"),
    ])  # fmt: skip
    odd = replace(graph, grids=graph.grids | {padded.x: Grid(0.5, 0, -128, 127)})
    check_all([(odd, "move: every input must be on the grid of the result")])
    check_all([(with_step(graph, Move, outs=("logits",)), "the result of a move step must be on a grid")])


def test_resizes_and_pools() -> None:
    graph = GRAPHS["pyramid"]()
    resize = next(step for step in graph.steps if isinstance(step, Resize))
    pools = GRAPHS["inception"]()
    check_all([
        (with_step(graph, Resize, rows=resize.rows + 1), r"resize: rows must be in \[0, 4\)"),
        (with_step(graph, Resize, columns=resize.columns - 1), r"resize: columns must be in \[0, 5\)"),
        (with_step(graph, Resize, rows=resize.rows[:1]), "resize: rows must be int32"),
        (with_step(graph, Resize, rows=resize.rows.flatten()), "resize: rows must be"),
        (with_step(graph, Resize, row_weights=resize.row_weights + 1), r"weights of rows must be in \[0, 1\]"),
        (with_step(graph, Resize, row_weights=resize.row_weights * NAN), "weights of rows must be at most"),
        (with_step(graph, Resize, column_weights=resize.row_weights), "weights of columns must be float32"),
        (with_step(pools, MaxPool, padding=(2, 2)), "a pool's padding must be at most half of its kernel"),
        (with_step(pools, MaxPool, dilation=(9, 9)), "kernel must be within"),
        (with_step(pools, MaxPool, kernel=None), "max pool: geometry must be none of an adaptive pool"),
        (with_step(pools, MaxPool, ceil_mode=1), "ceil_mode must be true or false"),
        (with_step(graph, AveragePool, divisor=-1), "average pool: divisor must be in"),
        (with_step(graph, AveragePool, stride=(2, 2)), "average pool: geometry must be none of an adaptive pool"),
        (with_step(graph, AveragePool, output=(0, 1)), "average pool: output must be 2 integers"),
        (with_step(graph, AveragePool, ceil_mode=None), "ceil_mode and count_include_pad must be true or false"),
    ])  # fmt: skip
