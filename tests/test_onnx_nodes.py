"""Which nodes the steps of an integer network become in ONNX, and that they are what the engine computes."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dfq.engine.graph import (
    IMAGES,
    AveragePool,
    IntegerGraph,
    Layer,
    MaxPool,
    Move,
    Output,
    Quantize,
    Rescale,
    Resize,
    Step,
    Table,
)
from dfq.export.onnx import output_names, save_onnx
from dfq.export.onnx_nodes.functions import near_tie, reals_of
from dfq.export.onnx_nodes.pools import _factor
from dfq_kernels.integers import Grid
from tests.bilinear import places
from tests.integer_networks import reference_values
from tests.onnx_runtime import in_onnx_runtime, operators, written
from tests.random_networks import FUNCTIONS

GRID, OUT = Grid(0.0625, 120, 0, 255), Grid(0.07133, -3, -128, 127)
SHAPE = (12, 6, 8)


def network(*steps: Step, shape: tuple[int, ...] = SHAPE, result: str = "y", on: Grid | None = None) -> IntegerGraph:
    """Images as `x` on GRID, these steps, and what `result` stands for."""
    grids = {"x": GRID} | {out: on or GRID for step in steps for out in step.outs}
    every = (Quantize(IMAGES, ("x",), None), *steps, Rescale(result, ("out",), None))
    made = IntegerGraph(shape, grids, every, (Output("out", (1,)),))
    images = torch.zeros(1, *shape)
    real = reference_values(replace(made, outputs=(Output("out", (1,), torch.zeros(1, dtype=torch.int64)),)), images)
    return replace(made, outputs=(Output("out", tuple(real["out"].shape[1:])),))


def agrees(graph: IntegerGraph, folder: Path, least: float = 1.0) -> None:
    """Fused and not, in so many of its numbers; the others are one step of a grid off."""
    images = 6 * torch.randn(2, *graph.input_shape, generator=torch.Generator().manual_seed(3))
    expected = reference_values(graph, images)["out"]
    for fused in (False, True):
        (found,) = in_onnx_runtime(graph, folder / "net.onnx", images, fused=fused)
        off = (found - expected.view_as(found)).abs()
        assert float((off < 1e-5).float().mean()) >= least and float(off.max()) < 1.01 * max(GRID.scale, OUT.scale)


def moved(shape: tuple[int, int, int], **keywords: object) -> Move:
    return Move("x", ("y",), None, shape, **keywords)  # type: ignore[arg-type]


def index_of(view: Tensor) -> Tensor:
    return view.flatten().int()


WHOLE = torch.arange(math.prod(SHAPE)).view(SHAPE)
PIXELS = torch.arange(48, dtype=torch.int32).view(6, 8)
SHUFFLED = torch.arange(12, dtype=torch.int32).view(3, 4).T.flatten()
TURNED = {"Reshape": 2, "Transpose": 1}
# a move and the nodes that it is
MOVES: dict[str, tuple[Move, dict[str, int]]] = {
    "slice": (moved((4, 6, 8), channels=torch.arange(3, 7, dtype=torch.int32)), {"Slice": 1}),
    "strided_slice": (moved((6, 6, 8), channels=torch.arange(0, 12, 2, dtype=torch.int32)), {"Slice": 1}),
    "roll": (moved(SHAPE, channels=torch.arange(12).roll(3).int()), {"Slice": 2, "Concat": 1}),
    "channel_shuffle": (moved(SHAPE, channels=SHUFFLED), TURNED),
    "turned_around": (moved(SHAPE, channels=torch.arange(11, -1, -1, dtype=torch.int32)), {"Gather": 1}),
    "some_absent": (moved((3, 6, 8), channels=torch.tensor([-1, 5, -1]).int(), fill=7), {"Gather": 1, "Where": 1}),
    "reshape": (moved((24, 3, 8), index=torch.arange(576, dtype=torch.int32)), {"Reshape": 1}),
    "transpose": (moved((12, 8, 6), index=index_of(WHOLE.transpose(1, 2))), TURNED),
    "channels_last": (moved((6, 8, 12), index=index_of(WHOLE.permute(1, 2, 0))), TURNED),
    "pixel_shuffle": (moved((3, 12, 16), index=index_of(F.pixel_shuffle(WHOLE, 2))), TURNED),
    "pixel_unshuffle": (moved((48, 3, 4), index=index_of(F.pixel_unshuffle(WHOLE, 2))), TURNED),
    "transposed_pixels": (moved((12, 8, 6), pixels=PIXELS.T.flatten()), TURNED),
    "flip": (moved(SHAPE, pixels=PIXELS.flip(1).flatten()), {"Gather": 1}),
    "crop": (moved((12, 4, 8), pixels=PIXELS[1:5].flatten()), {"Slice": 1}),
    "every_other_pixel": (moved((12, 3, 4), pixels=PIXELS[::2, 1::2].flatten()), {"Slice": 2}),
    "pad": (moved((12, 9, 10), pixels=F.pad(PIXELS[None], (0, 2, 1, 2), value=-1).flatten(), fill=9), {"Pad": 1}),
    "nearest": (moved((12, 12, 16), pixels=PIXELS.repeat_interleave(2, 0).repeat_interleave(2, 1).flatten()),
                {"Gather": 2}),
    "anywhere": (moved((1, 2, 2), index=torch.tensor([7, -1, 0, 400]).int()), {"Reshape": 2, "Gather": 1, "Where": 1}),
    "some_pixels": (moved((12, 1, 3), pixels=torch.tensor([7, -1, 20]).int()), {"Reshape": 2, "Gather": 1, "Where": 1}),
}  # fmt: skip


@pytest.mark.parametrize("name", MOVES)
def test_moves(name: str, tmp_path: Path) -> None:
    step, nodes = MOVES[name]
    graph = network(step)
    common = {"QuantizeLinear": 1, "DequantizeLinear": 1, "Identity": 1}
    assert written(graph, tmp_path) == common | nodes
    agrees(graph, tmp_path)


def test_concatenations_stay_between_integers(tmp_path: Path) -> None:
    """As in a dense block: two layers, joined, and a layer that reads both; nothing is computed in fp32."""
    random = torch.Generator().manual_seed(1)

    def layer(x: str, out: str, outer: int, inner: int) -> Layer:
        weight = torch.randint(-8, 8, (outer, inner, 3, 3), generator=random).to(torch.int8)
        mult, bias = torch.rand(outer, generator=random) / 64, torch.zeros(outer)
        return Layer(x, (out,), "relu", out, weight, 8, mult, bias, None, padding=(1, 1))

    graph = network(
        layer("x", "a", 5, 12), layer("x", "b", 7, 12),
        Move("a", ("c",), None, SHAPE, others=("b",)), layer("c", "y", 4, 12),
    )  # fmt: skip
    nodes = written(graph, tmp_path)
    assert nodes["Concat"] == 1 and nodes["Clip"] == 3  # a ReLU whose grid ends at 255 - 120
    optimized = operators(graph, tmp_path)
    assert optimized["QLinearConv"] == 3 and optimized["Conv"] + optimized["FusedConv"] == 0
    assert optimized["Concat"] == 1 and optimized["DequantizeLinear"] == 1
    agrees(graph, tmp_path)


@pytest.mark.parametrize(
    ("channels", "nodes"),
    [
        (None, {"Concat": 1}),
        (torch.arange(24).view(2, 12).T.flatten(), {"Concat": 1} | TURNED),
        (torch.arange(1, 24, 2), {"Concat": 1, "Slice": 1}),
        (torch.arange(6, 20), {"Concat": 1, "Slice": 2}),
        (torch.arange(23, -1, -1), {"Concat": 1, "Gather": 1}),
        (torch.tensor([3, -1, 20]), {"Concat": 1, "Gather": 1, "Where": 1}),
    ],
)
def test_moves_of_several_values(channels: Tensor | None, nodes: dict[str, int], tmp_path: Path) -> None:
    places = None if channels is None else channels.int()
    step = moved((24 if channels is None else len(channels), 6, 8), others=("z",), channels=places)
    pool = AveragePool("x", ("z",), None, (3, 3), (1, 1), (1, 1))
    common = {"QuantizeLinear": 2, "DequantizeLinear": 2, "Identity": 1, "AveragePool": 1}
    assert written(network(pool, step), tmp_path) == common | nodes
    agrees(network(pool, step), tmp_path, 0.98)


def test_a_lower_fill_than_a_relu_leaves(tmp_path: Path) -> None:
    """The values that a move joins have one lowest integer: the ReLU is a Clip from below then."""
    relu = Rescale("x", ("a",), "relu")
    move = Move("a", ("y",), None, (12, 7, 8), pixels=F.pad(PIXELS, (0, 0, 1, 0), value=-1).flatten(), fill=3)
    agrees(network(relu, move), tmp_path)
    maximum = MaxPool("y", ("z",), None, (2, 2), (2, 2))
    agrees(network(relu, move, maximum, result="z"), tmp_path)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_operators(name: str, tmp_path: Path) -> None:
    """Where the table holds what its name says, and no value is near a tie; any other table is looked up."""
    values = FUNCTIONS[name](reals_of(GRID)).float()
    scales = (OUT.scale * (1 + step / 1000) for step in range(1000))
    on = next(
        grid for grid in (replace(OUT, scale=scale) for scale in scales) if not near_tie(values, reals_of(GRID), grid)
    )
    graph = network(Table("x", ("y",), None, values, name), on=on)
    nodes = written(graph, tmp_path)
    assert nodes["Gather"] == 0 and nodes["Cast"] == 0
    agrees(graph, tmp_path)
    for other in (Table("x", ("y",), None, values + 0.01, name), Table("x", ("y",), None, values, "")):
        graph = network(other, on=on)
        assert written(graph, tmp_path)["Gather"] == 1
        agrees(graph, tmp_path)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_near_a_tie_is_looked_up(name: str, tmp_path: Path) -> None:
    """One argument of 256 lies where runtimes may round to either side; 0.4 % of a network's values have it."""
    values = FUNCTIONS[name](reals_of(GRID)).float()
    largest = values[torch.isfinite(values)].abs().argmax()
    on = Grid(float(values[largest].abs()) / 100.5, 0, -128, 127)
    assert near_tie(values, reals_of(GRID), on)
    graph = network(Table("x", ("y",), None, values, name), on=on)
    nodes = written(graph, tmp_path)
    assert nodes["Gather"] == 1 and nodes["QuantizeLinear"] == 1  # of the images
    agrees(graph, tmp_path)


@pytest.mark.parametrize("align", [False, True])
@pytest.mark.parametrize("size", [(12, 16), (3, 5), (1, 1), (6, 8)])
def test_resizes(size: tuple[int, int], align: bool, tmp_path: Path) -> None:
    (rows, down), (columns, across) = (places(side, out, align) for side, out in zip(SHAPE[1:], size, strict=True))
    step = Resize("x", ("y",), None, rows, down, columns, across)
    graph = network(step, on=OUT)
    assert written(graph, tmp_path)["Resize"] == 1
    agrees(graph, tmp_path)
    for other, on in ((step, GRID), (replace(step, row_weights=down * 0.75), OUT)):  # integers, which would be cut off
        graph = network(other, on=on)
        nodes = written(graph, tmp_path)
        plain = on is OUT and not bool(down.any())
        assert (nodes["Resize"], nodes["MatMul"]) == ((1, 0) if plain else (0, 2))
        agrees(graph, tmp_path, 0.98 if on is GRID else 1.0)  # to which means of two of its integers are ties


@pytest.mark.parametrize("size", [(12, 16), (5, 7)])
def test_a_resize_between_convolutions(size: tuple[int, int], tmp_path: Path) -> None:
    """ONNX Runtime moves channels behind pixels for integer convolutions, and back again: through the resize."""
    eye = torch.eye(12, dtype=torch.int8).view(12, 12, 1, 1)
    layer = Layer("x", ("a",), None, "a", 64 * eye, 8, torch.full((12,), GRID.scale / 61), torch.zeros(12), None)
    (rows, down), (columns, across) = (places(side, out, False) for side, out in zip(SHAPE[1:], size, strict=True))
    step = Resize("a", ("b",), None, rows, down, columns, across)
    graph = network(layer, step, replace(layer, x="b", outs=("y",), name="b"), on=OUT)
    graph = replace(graph, grids=graph.grids | {"a": GRID})
    assert written(graph, tmp_path)["Resize"] == 1 and operators(graph, tmp_path)["QLinearConv"] == 2
    agrees(graph, tmp_path, 0.98)


@pytest.mark.parametrize("side", [1, 3, 7, 49, 1000, 65535])
def test_a_factor_gives_its_side(side: int) -> None:
    for out in range(1, 400):
        assert int(np.float32(side) * _factor(side, out)) == int(side * float(_factor(side, out))) == out


POOLS = {
    "plain": (AveragePool("x", ("y",), None, (3, 3), (2, 2), (1, 1)), "AveragePool"),
    "uncounted": (AveragePool("x", ("y",), None, (3, 3), (2, 2), (1, 1), count_include_pad=False), "AveragePool"),
    "ceil_inside": (AveragePool("x", ("y",), None, (2, 2), (2, 2), ceil_mode=True), "AveragePool"),
    "ceil_uncounted": (AveragePool("x", ("y",), None, (3, 3), (2, 2), ceil_mode=True, count_include_pad=False),
                       "AveragePool"),
    "ceil_counted": (AveragePool("x", ("y",), None, (3, 3), (2, 2), ceil_mode=True), "MatMul"),
    "divisor": (AveragePool("x", ("y",), None, (2, 2), (2, 2), divisor=3), "MatMul"),
    "global": (AveragePool("x", ("y",), None), "AveragePool"),
    "even": (AveragePool("x", ("y",), None, output=(3, 2)), "AveragePool"),
    "uneven": (AveragePool("x", ("y",), None, output=(4, 3)), "MatMul"),
    "to_more": (AveragePool("x", ("y",), None, output=(9, 8)), "MatMul"),
    "even_maximum": (MaxPool("x", ("y",), None, None, output=(3, 2)), "MaxPool"),
    "uneven_maximum": (MaxPool("x", ("y",), None, None, output=(4, 9)), "ReduceMax"),
}  # fmt: skip


@pytest.mark.parametrize("name", POOLS)
def test_pools(name: str, tmp_path: Path) -> None:
    step, kind = POOLS[name]
    graph = network(step, on=GRID if isinstance(step, MaxPool) else OUT)
    assert written(graph, tmp_path)[kind] >= 1
    agrees(graph, tmp_path, 1.0)


def test_outputs_have_the_structure_s_names(tmp_path: Path) -> None:
    steps = (Quantize(IMAGES, ("logits",), None), Rescale("logits", ("a",), None), Rescale("logits", ("b",), "relu"))
    last = Output("b", (6,), torch.arange(6), "softmax")
    graph = IntegerGraph(SHAPE, {"logits": GRID}, steps, (Output("a", SHAPE), last))
    for structure, names in (
        ({"out": 0, "aux": [1]}, ["out", "aux.0"]), ([1, {"b": 0}], ["output.1.b", "output.0"]),
    ):  # fmt: skip
        made = replace(graph, structure=structure)
        save_onnx(made, tmp_path / "net.onnx")
        model = onnx.load(str(tmp_path / "net.onnx"))
        assert [item.name for item in model.graph.output] == output_names(made) == names
    save_onnx(replace(graph, structure={"logits": 0, "images": 1}), tmp_path / "net.onnx")  # values have these names
    found = onnx.load(str(tmp_path / "net.onnx")).graph.output
    assert [item.name for item in found] == ["logits.output", "images.output"]
    assert output_names(replace(graph, outputs=(last,), structure=0)) == ["logits"]
    assert output_names(replace(graph, outputs=(Output("a", SHAPE),), structure=0)) == ["output"]
