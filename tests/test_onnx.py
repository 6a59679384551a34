"""Integer networks in ONNX Runtime: the same classes, and results within what its rounding may change."""

from __future__ import annotations

import importlib
import sys
import tempfile
from pathlib import Path

import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from torch import Tensor, nn

from dfq.data import load_images
from dfq.engine import Engine, IntegerGraph
from dfq.engine.check import check_graph
from dfq.engine.graph import IMAGES, Grid, Layer, Output, Quantize
from dfq.engine.run import output_of
from dfq.export import ExportError, export
from dfq.export.onnx import output_names, save_onnx
from tests.integer_networks import NETWORKS, exported, input_shape, quantized, reference_values
from tests.onnx_runtime import from_a_tie, in_onnx_runtime, integers, operators
from tests.random_networks import networks

NEAR = 1e-3  # steps of a grid, to a tie


@pytest.mark.parametrize("preset", ["W8A8", "W2A2"])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_is_written(name: str, preset: str, tmp_path: Path) -> None:
    _, graph = exported(name, preset)
    images = torch.randn(20, *input_shape(name), generator=torch.Generator().manual_seed(5))
    expected = Engine(graph)(images)
    (found,) = in_onnx_runtime(graph, tmp_path / "net.onnx", images, fused=False)
    assert float((found - expected).abs().max()) <= 0.05 * float(expected.std())
    onnx.checker.check_model(str(tmp_path / "net.onnx"), full_check=True)


@pytest.mark.parametrize("preset", ["W8A8", "W4A4"])
def test_the_test_set_has_the_same_classes(preset: str, tmp_path: Path) -> None:
    _, graph = exported("wrn-16-1", preset)
    test = load_images("fashion-mnist", "test").head(2000)
    images = test.normalize(test.pixels)
    expected = Engine(graph)(images)
    for fused in (False, True):
        (found,) = in_onnx_runtime(graph, tmp_path / "net.onnx", images, fused=fused)
        assert float((found.argmax(1) == expected.argmax(1)).float().mean()) >= 0.9995
        assert float((found - expected).abs().max()) <= 0.5


class Odd(nn.Module):
    """Turned channels, grouped and dilated convolutions, pools with padding, a pool with several windows."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 12, 3, 2, 1, bias=False), nn.BatchNorm2d(12)
        self.conv2, self.bn2 = nn.Conv2d(12, 24, 3, 1, 2, dilation=2, groups=4, bias=False), nn.BatchNorm2d(24)
        self.max, self.average = nn.MaxPool2d(3, 2, 1, ceil_mode=True), nn.AvgPool2d(3, 2, 1)
        self.pool, self.fc = nn.AdaptiveAvgPool2d((2, 2)), nn.Linear(96, 5)
        with torch.no_grad():
            self.bn1.weight[::2] = -1
            self.bn2.weight[::3] = 0

    def forward(self, x: Tensor) -> Tensor:
        x = self.max(torch.relu(self.bn1(self.conv1(x))))
        x = self.average(nn.functional.relu6(self.bn2(self.conv2(x))))
        return self.fc(self.pool(x).flatten(1))


def test_odd_networks_are_written(tmp_path: Path) -> None:
    torch.manual_seed(0)
    graph = export(quantized(Odd().eval(), (3, 40, 40), "W4A8"))
    images = torch.randn(10, 3, 40, 40)
    expected = Engine(graph)(images)
    assert torch.equal(Engine(graph, backend="reference")(images), expected)
    (found,) = in_onnx_runtime(graph, tmp_path / "net.onnx", images, fused=False)
    assert float((found - expected).abs().max()) <= 0.05 * float(expected.std())


def test_pools_of_unequal_windows_are_written(tmp_path: Path) -> None:
    torch.manual_seed(0)
    graph = export(quantized(Odd().eval(), (3, 32, 32), "W4A8"))
    images = torch.randn(10, 3, 32, 32)
    expected = Engine(graph)(images)
    (found,) = in_onnx_runtime(graph, tmp_path / "net.onnx", images, fused=False)
    assert float((found - expected).abs().max()) <= 0.05 * float(expected.std())


def test_without_the_package_the_reason_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ExportError, match="the package onnx must be installed"):
        save_onnx(exported("wrn-16-1", "W8A8")[1], tmp_path / "net.onnx")
    monkeypatch.undo()
    assert importlib.import_module("onnx") is onnx


@settings(max_examples=120, deadline=None, derandomize=True)
@given(graph=networks(), seed=st.integers(0, 2**31))
def test_any_network_has_its_shapes_and_its_values(graph: IntegerGraph, seed: int) -> None:
    """Every value's shape is that of `check_graph`; the first value that differs does so at ties or by its bias."""
    images = 3 * torch.randn(2, *graph.input_shape, generator=torch.Generator().manual_seed(seed))
    expected, shapes = reference_values(graph, images), check_graph(graph)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.onnx"
        save_onnx(graph, path)
        model = onnx.shape_inference.infer_shapes(onnx.load(str(path)), check_type=True, strict_mode=True)
        named = {item.name: item.type.tensor_type.shape.dim for item in (*model.graph.value_info, *model.graph.output)}
        assert graph.grids.keys() <= named.keys()
        for name in graph.grids:
            assert tuple(dim.dim_value for dim in named[name][1:]) == shapes[name]
        read = {item for node in model.graph.node for item in node.input} | {item.name for item in model.graph.output}
        assert not [node.name for node in model.graph.node if node.output[0] not in read | graph.grids.keys()]
        assert [item.name for item in model.graph.output] == output_names(graph)
        for fused in (False, True):
            same = check_first_difference(graph, images, integers(graph, path, images, fused=fused), expected)
            for output, found in zip(graph.outputs, in_onnx_runtime(graph, path, images, fused=fused), strict=True):
                wanted = output_of(output, expected[output.value], output.order)
                assert found.shape == wanted.shape
                if same:
                    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


def check_first_difference(
    graph: IntegerGraph, images: Tensor, found: dict[str, Tensor], expected: dict[str, Tensor]
) -> bool:
    """Of the first value that differs: by one, and at a tie; behind a layer, whose bias may be rounded, few may.

    Returns whether none does.
    """
    for step in graph.steps:
        for name in step.outs:
            if name not in found:
                continue
            off = (found[name] - expected[name].view_as(found[name])).abs()
            if not bool(off.any()):
                continue
            few = int((off > 0).sum()) <= max(2, off.numel() // 16)
            tied = not isinstance(step, Quantize) and (
                float(from_a_tie(graph, name, images).view_as(off)[off > 0].max()) < NEAR
            )
            assert int(off.max()) == 1 and (tied or (few and isinstance(step, (Layer, Quantize)))), (name, step)
            return False
    return True


def one_layer(scale: Grid, out: Grid | None, **layer: object) -> IntegerGraph:
    """Images on a grid, one layer, and where it has a result on a grid a linear layer that sums it up."""
    settings = {"x": "x", "outs": ("y",), "activation": None, "name": "layer", "weight_bits": 8, "residual": None}
    first = Layer(**{**settings, **layer})  # type: ignore[arg-type]
    count = len(first.weight)
    ones = torch.ones(count)
    last = Layer("y", ("logits",), None, "last", torch.eye(count, dtype=torch.int8), 8, ones, 0 * ones, None)
    steps = (Quantize(IMAGES, ("x",), None), first, last)
    shape = (first.weight.shape[1], 1, 1)
    return IntegerGraph(shape, {"x": scale, "y": out}, steps, (Output("logits", (count,)),))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("input_scale", [2.0**-126, 1e-3, 1.0, 2.0**60])
@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-30, 1e-12, 1e-9, 1e-7, 1e-3])
def test_channels_that_hardly_move_keep_their_bias(
    size: float, input_scale: float, fused: bool, tmp_path: Path
) -> None:
    """A pruned channel, or a batch norm whose gamma is next to nothing, of either sign, with and without bias."""
    weight = torch.randint(-128, 128, (6, 4, 1, 1), generator=torch.Generator().manual_seed(2)).to(torch.int8)
    weight[0, 0], weight[1, 0], weight[5] = -128, -128, 0
    mult, bias = size * torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, 1.0]), torch.tensor([1.5, 1.5, -1.5, 1e-6, 0.0, 0.75])
    graph = one_layer(Grid(input_scale, 0, -128, 127), Grid(2 / 255, 3, -128, 127), weight=weight, mult=mult, bias=bias)
    images = input_scale * torch.randint(-128, 128, (64, 4, 1, 1), generator=torch.Generator().manual_seed(3)).float()
    found = integers(graph, tmp_path / "net.onnx", images, fused=fused)["y"]
    expected = reference_values(graph, images)["y"].view_as(found)
    assert int((found - expected).abs().max()) <= (1 if size == 1e-3 else 0)
    model = onnx.load(str(tmp_path / "net.onnx"))
    scales = {item.name: numpy_helper.to_array(item) for item in model.graph.initializer if "scale" in item.name}
    assert "y.total.weight_scale" in scales and all((scale >= 2.0**-126).all() for scale in scales.values())
    products = scales["x.scale"] * scales["y.total.weight_scale"]
    assert (products >= 2.0**-126).all() and (abs(bias.numpy()) / products < 2.0**31).all()


def test_a_bias_between_coarse_sums_is_not_rounded(tmp_path: Path) -> None:
    """One more in a sum of 8-bit integers is 10 steps of the result, the bias 4.4 of them."""
    weight = torch.tensor([[127, 1], [-100, 3]], dtype=torch.int8).view(2, 2, 1, 1)
    mult, bias = torch.tensor([0.1, 0.1]), torch.tensor([0.044, -0.044])
    graph = one_layer(Grid(1.0, 0, -128, 127), Grid(0.01, 0, -128, 127), weight=weight, mult=mult, bias=bias)
    images = torch.tensor([[0.0, 1.0], [0.0, -7.0], [1.0, 100.0], [-1.0, 127.0], [0.0, 0.0]]).view(5, 2, 1, 1)
    expected = reference_values(graph, images)["y"]
    for fused in (False, True):
        found = integers(graph, tmp_path / "net.onnx", images, fused=fused)["y"]
        assert torch.equal(found, expected.view_as(found))


def test_scales_beyond_fp32_are_refused(tmp_path: Path) -> None:
    weight, ones = torch.ones(2, 3, 1, 1, dtype=torch.int8), torch.ones(2)
    graph = one_layer(Grid(2.0**-126, 0, 0, 255), Grid(1.0, 0, 0, 255), weight=weight, mult=ones, bias=ones)
    with pytest.raises(ExportError, match=r"weight scales of layer must be at most 2\^120 in ONNX, got 8.51e\+37"):
        save_onnx(graph, tmp_path / "net.onnx")


class Block(nn.Module):
    """A stem, and what is in question between a signed stream and its end."""

    def __init__(self, kernel: int, activation: type[nn.Module], residual: bool) -> None:
        super().__init__()
        self.residual = residual
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16))
        self.expand = nn.Sequential(nn.Conv2d(16, 24, 1), nn.BatchNorm2d(24), activation())
        self.back = nn.Sequential(nn.Conv2d(24, 16, kernel, padding=kernel // 2), nn.BatchNorm2d(16))
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.back(self.expand(x))
        return self.fc(self.pool(x + y if self.residual else y).flatten(1))


@pytest.mark.parametrize(
    ("kernel", "activation", "residual", "in_float"),
    [(1, nn.ReLU, False, 0), (3, nn.ReLU6, False, 0), (1, nn.ReLU6, True, 0), (3, nn.ReLU, True, 1)],
)
@pytest.mark.parametrize("preset", ["W8A8", "W4A8"])
def test_what_onnx_runtime_computes_in_integers(
    preset: str, kernel: int, activation: type[nn.Module], residual: bool, in_float: int, tmp_path: Path
) -> None:
    """All but convolutions of more than a pixel whose sums are added to: two roundings would be another network."""
    torch.manual_seed(0)
    graph = export(quantized(Block(kernel, activation, residual).eval(), (3, 16, 16), preset))
    found = operators(graph, tmp_path)
    assert found["Conv"] + found["FusedConv"] + found["NhwcFusedConv"] == in_float
    assert found["QLinearConv"] == 3 - (residual and not in_float) - in_float
    assert found["MatMulIntegerToFloat"] == int(residual and not in_float) and found["QGemm"] == 1
    assert found["Relu"] + found["Min"] + found["Max"] + found["MatMul"] + found["Gemm"] == 0


@pytest.mark.parametrize(("preset", "in_float"), [("W8A8", 0), ("W4A8", 0)])
def test_mobilenet_has_no_convolution_in_float(preset: str, in_float: int, tmp_path: Path) -> None:
    found = operators(exported("mobilenet-v2", preset)[1], tmp_path)
    assert found["Conv"] + found["FusedConv"] == in_float and found["QLinearConv"] == 42


@pytest.mark.parametrize(
    ("name", "preset", "in_integers"),
    [("resnet20", "W4A4", 12), ("resnet20", "W2A2", 12), ("vgg11", "W2A2", 8), ("mobilenet-v2", "W4A4", 42)],
)
def test_integer_kernels_agree(name: str, preset: str, in_integers: int, tmp_path: Path) -> None:
    """ONNX Runtime adds a bias in int32, where the network's lies; one changed integer changes many after it."""
    _, graph = exported(name, preset)
    images = torch.randn(4, *input_shape(name), generator=torch.Generator().manual_seed(5))
    expected = reference_values(graph, images)
    found = integers(graph, tmp_path / "net.onnx", images, fused=True)
    changed = {key: float((value != expected[key].view_as(value)).float().mean()) for key, value in found.items()}
    assert max(changed.values()) <= 1e-3, changed
    assert operators(graph, tmp_path)["QLinearConv"] == in_integers
