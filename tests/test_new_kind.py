"""A kind of layer that does not exist, in this one file: captured, trained, exact, in integers, in ONNX."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import dfq
from dfq.engine import Engine, graph
from dfq.layers import kind as kinds
from dfq.layers.integers import Integers
from dfq.layers.kind import Kind, Layer, register
from dfq.layers.tail import Tail
from dfq.network.calls import Call
from dfq.quant import prepared_of
from dfq.student import integer_graph

LIBRARY = torch.library.Library("dfq_test", "DEF")
LIBRARY.define("above(Tensor x, float level) -> Tensor")


def above(x: Tensor, level: float) -> Tensor:
    """`max(x, 0) + level` where x > 0, else `level`: what no network has."""
    return x.clamp(min=0) + level


LIBRARY.impl("above", above, "CompositeExplicitAutograd")
LIBRARY.impl("above", above, "Meta")
LIBRARY.impl("above", lambda x, level: _Above.apply(x, level), "Autograd")


class _Above(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, level: float) -> Tensor:  # type: ignore[no-untyped-def, override]
        ctx.save_for_backward(x)
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.dfq_test.above(x, level)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def, override]
        return grad * (ctx.saved_tensors[0] > 0), None


class Above(Kind):
    """Which call it is; what it wants (a stream, as kinds do without a word) and promises; its layer."""

    name = "above"
    calls = ("dfq_test.above.default",)

    def never_negative(self, call: Call, operands: list[bool]) -> bool:
        return call.arguments()["level"] >= 0

    def layer(self, call: Call, tail: Tail) -> Layer:
        return QuantAbove(call.arguments()["level"], tail)


class QuantAbove(Layer):
    """The layer in training; its exact forward is the same; its integer step is one that the engine has."""

    def __init__(self, level: float, tail: Tail) -> None:
        super().__init__(tail)
        self.level = level

    def compute(self, *pairs: Tensor | None) -> Tensor:
        x = pairs[0]
        assert x is not None
        return x.clamp(min=0) + self.level

    def export(self, to: Integers) -> None:
        x = to.value(0)
        grid = to.grid(x)
        whole = torch.arange(grid.quant_min, grid.quant_max + 1) - grid.zero_point
        real = whole.float() * torch.tensor(grid.scale)
        to.step(graph.Table(x, (), None, real.clamp(min=0) + self.level))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.ops.dfq_test.above(self.conv(x), 0.25).mean((2, 3)))


@pytest.fixture
def known() -> Iterator[None]:
    register(Above)
    yield
    for call in Above.calls:
        del kinds._KINDS[call]


def calibrated(images: Tensor) -> torch.fx.GraphModule:
    torch.manual_seed(0)
    student = dfq.prepare(Net().eval(), tuple(images.shape[1:]), preset="W8A8")
    student(images).square().sum().backward()
    assert all(parameter.grad is not None for parameter in student.parameters())
    dfq.calibrate(student, [images])
    return student.eval()


def test_a_kind_is_one_file(known: None, tmp_path: Path) -> None:
    images = torch.randn(8, 3, 9, 9, generator=torch.Generator().manual_seed(1))
    student = calibrated(images)
    assert not prepared_of(student).floats
    with torch.no_grad():
        expected = student(images)
    made = integer_graph(student)
    assert torch.equal(Engine(made, backend="reference")(images), expected)
    assert torch.equal(Engine(made)(images), expected)
    onnxruntime = pytest.importorskip("onnxruntime")
    dfq.export_onnx(student, tmp_path / "net.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "net.onnx"), providers=["CPUExecutionProvider"])
    found = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
    assert float((found - expected).norm()) <= 0.02 * float(expected.norm())


def test_without_its_file_it_stays_in_floating_point() -> None:
    images = torch.randn(8, 3, 9, 9, generator=torch.Generator().manual_seed(1))
    student = calibrated(images)
    assert prepared_of(student).floats == (("", "dfq_test.above.default", "no integer form is known"),)
    with pytest.raises(dfq.export.ExportError, match=r"got floating-point parts: the model \(dfq_test.above.default: "):
        dfq.export_integers(student)
    with pytest.raises(dfq.export.ExportError, match="every call must have an ONNX form, got .*dfq_test"):
        dfq.export_onnx(student, "nowhere.onnx")
