"""Integer networks in ONNX Runtime: the same classes, and logits within what its rounding may change."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import onnx
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

from dfq.data import load_images
from dfq.engine import Engine, IntegerGraph
from dfq.export import ExportError, export
from dfq.onnx_export import save_onnx
from tests.integer_networks import NETWORKS, exported, input_shape, quantized


def in_onnx_runtime(graph: IntegerGraph, path: Path, images: Tensor, *, fused: bool) -> Tensor:
    """Logits; `fused`: with ONNX Runtime's own integer operators, else float operators between the roundings."""
    save_onnx(graph, path)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if not fused:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    parts = [session.run(None, {"images": part.numpy()})[0] for part in images.split(500)]
    return torch.cat([torch.from_numpy(part) for part in parts])


@pytest.mark.parametrize("preset", ["W8A8", "W2A2"])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_is_written(name: str, preset: str, tmp_path: Path) -> None:
    _, graph = exported(name, preset)
    images = torch.randn(20, *input_shape(name), generator=torch.Generator().manual_seed(5))
    expected = Engine(graph)(images)
    found = in_onnx_runtime(graph, tmp_path / "net.onnx", images, fused=False)
    assert float((found - expected).abs().max()) <= 0.05 * float(expected.std())
    onnx.checker.check_model(str(tmp_path / "net.onnx"), full_check=True)


@pytest.mark.parametrize("preset", ["W8A8", "W4A4"])
def test_the_test_set_has_the_same_classes(preset: str, tmp_path: Path) -> None:
    _, graph = exported("wrn-16-1", preset)
    test = load_images("fashion-mnist", "test").head(2000)
    images = test.normalize(test.pixels)
    expected = Engine(graph)(images)
    for fused, least, most in ((False, 0.9995, 0.5), (True, 0.997, 0.5)):
        found = in_onnx_runtime(graph, tmp_path / "net.onnx", images, fused=fused)
        assert float((found.argmax(1) == expected.argmax(1)).float().mean()) >= least
        assert float((found - expected).abs().max()) <= most


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
    graph = export(quantized(Odd().eval(), (3, 40, 40), "W4A8"), (3, 40, 40), 5)
    images = torch.randn(10, 3, 40, 40)
    expected = Engine(graph)(images)
    assert torch.equal(Engine(graph, backend="reference")(images), expected)
    found = in_onnx_runtime(graph, tmp_path / "net.onnx", images, fused=False)
    assert float((found - expected).abs().max()) <= 0.05 * float(expected.std())


def test_pools_of_unequal_windows_are_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    graph = export(quantized(Odd().eval(), (3, 32, 32), "W4A8"), (3, 32, 32), 5)
    with pytest.raises(ExportError, match=r"pools in ONNX must have equal windows, got \(5, 5\) to \(2, 2\)"):
        save_onnx(graph, tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())


def test_without_the_package_the_reason_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ExportError, match="the package onnx must be installed"):
        save_onnx(exported("wrn-16-1", "W8A8")[1], tmp_path / "net.onnx")
    monkeypatch.undo()
    assert importlib.import_module("onnx") is onnx
