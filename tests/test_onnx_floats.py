"""Networks with parts in floating point, in ONNX by torch's exporter and in ONNX Runtime."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

import dfq
from dfq.config import quant_config
from dfq.export import ExportError
from dfq.quant import prepared_of
from dfq.quant.quantizers import weight_layers
from tests.onnx_runtime import session


class Mixed(nn.Module):
    """Convolutions around a group norm, a softmax inside; batch norms with negative and (asked for) dead channels."""

    def __init__(self, dead: bool) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.wide = nn.Sequential(nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16), nn.SiLU())
        self.norm = nn.GroupNorm(4, 16)
        self.back = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.BatchNorm2d(16), nn.ReLU())
        self.first, self.last = nn.Linear(16, 12), nn.Linear(12, 5)
        for norm in (self.stem[1], self.wide[1], self.back[1]):
            assert isinstance(norm, nn.BatchNorm2d) and norm.weight is not None
            with torch.no_grad():
                norm.weight[::3] = -0.7
                norm.running_mean.uniform_(-0.5, 0.5)  # type: ignore[union-attr]
                norm.bias.uniform_(-0.5, 0.5)
                if dead:
                    norm.weight[1] = 0.0

    def forward(self, x: Tensor) -> Tensor:
        x = self.back(self.norm(self.wide(self.stem(x)))).mean((2, 3))
        logits: Tensor = self.last(torch.softmax(self.first(x), 1))
        return logits


def written(dead: bool, preset: str, path: Path) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(3)
    images = torch.randn(16, 3, 12, 12)
    student = dfq.prepare(Mixed(dead).eval(), (3, 12, 12), preset=preset)
    dfq.calibrate(student, [images])
    assert len(prepared_of(student).floats) == 2
    dfq.export_onnx(student, path)
    return student.eval(), images


@pytest.mark.parametrize("dead", [False, True], ids=["", "dead channels"])
@pytest.mark.parametrize("preset", ["W8A8", "W4A8", "W4A4"])
def test_onnx_runtime_gives_the_student_s_logits(preset: str, dead: bool, tmp_path: Path) -> None:
    student, images = written(dead, preset, tmp_path / "net.onnx")
    with torch.no_grad():
        expected = student(images)
    for fused in (False, True):
        found = torch.from_numpy(session(tmp_path / "net.onnx", fused=fused).run(None, {"images": images.numpy()})[0])
        assert float((found - expected).norm()) <= 0.01 * float(expected.norm()), fused


def test_channels_of_the_lowest_integer_are_turned_around(tmp_path: Path) -> None:
    """By a negative batch norm, which -128 does not allow in int8: the channel's result is turned instead."""
    torch.manual_seed(3)
    images = torch.randn(16, 3, 12, 12)
    student = dfq.prepare(Mixed(False).eval(), (3, 12, 12), config=quant_config("W8A8", ranges="lsq"))
    dfq.calibrate(student, [images])
    lowest = 0
    with torch.no_grad():
        for _, quantizer, weight in weight_layers(student):
            quantizer.scale.mul_(0.5)
            lowest = min(lowest, int((quantizer(weight)[0].flatten(1).amin(1) / quantizer.scale).min().round()))
        expected = student.eval()(images)
    assert lowest == -128
    dfq.export_onnx(student, tmp_path / "net.onnx")
    found = torch.from_numpy(session(tmp_path / "net.onnx", fused=True).run(None, {"images": images.numpy()})[0])
    assert float((found - expected).norm()) <= 0.01 * float(expected.norm())


def test_weights_with_zero_points_are_refused(tmp_path: Path) -> None:
    config = replace(quant_config("W4A4"), weight_scheme="affine")
    student = dfq.prepare(Mixed(False).eval(), (3, 12, 12), config=config)
    dfq.calibrate(student, [torch.randn(4, 3, 12, 12)])
    with pytest.raises(ExportError, match=r"export: weights of stem\.0 must be symmetric, got zero points"):
        dfq.export_onnx(student, tmp_path / "net.onnx")
    assert not (tmp_path / "net.onnx").exists()


@pytest.mark.parametrize("dead", [False, True], ids=["", "dead channels"])
def test_convolutions_are_integers_and_batch_norms_their_scales(dead: bool, tmp_path: Path) -> None:
    written(dead, "W8A8", tmp_path / "net.onnx")
    session(tmp_path / "net.onnx", fused=True, optimized=tmp_path / "optimized.onnx")
    found = Counter(node.op_type for node in onnx.load(str(tmp_path / "optimized.onnx")).graph.node)
    assert found["QLinearConv"] == 3 and found["Conv"] + found["BatchNormalization"] == 0


@pytest.mark.parametrize("near", [False, True])
def test_functions_near_a_tie_are_looked_up(near: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`near_tie` says of which tables (`test_onnx_nodes`); here of all or none."""
    monkeypatch.setattr("dfq.export.portable.near_tie", lambda *_: near)
    torch.manual_seed(3)
    layers = nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 8, 3), nn.GroupNorm(2, 8), nn.Flatten(), nn.Linear(512, 5)
    student, images = dfq.prepare(nn.Sequential(*layers).eval(), (3, 12, 12)), torch.randn(16, 3, 12, 12)
    dfq.calibrate(student, [images])
    dfq.export_onnx(student, tmp_path / "net.onnx")
    nodes = Counter(node.op_type for node in onnx.load(str(tmp_path / "net.onnx")).graph.node)
    assert (nodes["Sigmoid"], any(name.startswith("Gather") for name in nodes)) == (int(not near), near)
    with torch.no_grad():
        expected = student.eval()(images)
    found = torch.from_numpy(session(tmp_path / "net.onnx", fused=True).run(None, {"images": images.numpy()})[0])
    assert float((found - expected).norm()) <= 0.01 * float(expected.norm())
