"""Every kind of layer, written in every way: trained, exact, in integers; zero tolerance between the last two."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import dfq
from dfq.engine import Engine
from dfq.layers.activation import Ending
from dfq.layers.table import QuantTable
from dfq.layers.tail import Tail, activate
from dfq.layers.weighted import on_accumulators
from dfq.quant import prepared_of
from dfq.student import integer_graph
from dfq_kernels import extension
from tests.layer_networks import NETWORKS, network


def leaves(value: object) -> list[Tensor]:
    return pytree.tree_leaves(value)


BOTH = [(name, "W8A8") for name in NETWORKS] + [
    (name, "W4A4") for name in [*list(NETWORKS)[::3], "a pool beside a layer of other bits"]
]


@pytest.mark.parametrize(("name", "preset"), BOTH)
def test_every_layer_in_training_and_in_integers(name: str, preset: str) -> None:
    model, shape = network(name)
    images = torch.randn(16, *shape, generator=torch.Generator().manual_seed(5))
    student = dfq.prepare(model, shape, preset=preset)
    assert not prepared_of(student).floats
    sum(out.square().mean() for out in leaves(student(images))).backward()
    assert all(parameter.grad is not None for parameter in student.parameters())
    dfq.calibrate(student, [images])
    with torch.no_grad():
        expected, exact = leaves(model(images)), leaves(student.eval()(images))
        trained = leaves(student.train()(images))
    for real, one, other in zip(expected, exact, trained, strict=True):
        most = 0.08 if preset == "W8A8" else 0.8
        assert float((one - real).norm()) <= most * float(real.norm())
        assert float((one - other).norm()) <= most * float(real.norm())
    graph = integer_graph(student.eval())
    backends = ["reference"] if extension.missing("cpu") else ["reference", "native"]
    for backend in backends:
        found = leaves(Engine(graph, backend=backend)(images[:3]))
        assert [tuple(out.shape) for out in found] == [tuple(out[:3].shape) for out in exact]
        assert all(torch.equal(one, other[:3]) for one, other in zip(found, exact, strict=True)), backend


@pytest.mark.parametrize(("name", "step", "rise"), [("sigmoid", 8.0, 1.0), ("tanh", 5.0, 2.0), ("silu", 4.0, 510.0)])
def test_a_table_has_the_mean_slope_of_each_step(name: str, step: float, rise: float) -> None:
    """So the slopes add up to the function's rise, however coarse its grid is."""
    layer = QuantTable(getattr(F, name), name, Tail()).train()
    x = (torch.arange(-128, 128) * step).requires_grad_()
    layer(x, torch.tensor(step)).sum().backward()
    assert x.grad is not None and abs(float(x.grad.sum()) * step - rise) < 1e-3 * rise


@pytest.mark.parametrize(("text", "rise"), [("hardsigmoid", 1.0), ("relu6", 6.0), ("hardtanh(-1.0,2.0)", 3.0)])
def test_an_activation_of_its_own_has_it_too(text: str, rise: float) -> None:
    layer = Ending(Tail(activation=text)).train()
    x = (torch.arange(-128, 128) * 20.0).requires_grad_()
    out = layer(x, torch.tensor(20.0))
    out.sum().backward()
    assert torch.equal(out, activate(x, text)) and x.grad is not None
    assert float(x.grad.sum()) * 20 == pytest.approx(rise, rel=1e-4)


def test_a_root_has_no_slope_where_it_ends() -> None:
    """At 0 the root itself rises without bound."""
    layer = QuantTable(torch.sqrt, "root", Tail()).train()
    x = torch.arange(0.0, 4.0).requires_grad_()
    layer(x, torch.tensor(1.0)).sum().backward()
    assert x.grad is not None and x.grad.tolist() == pytest.approx(
        [0.0, *((q + 0.5) ** 0.5 - (q - 0.5) ** 0.5 for q in (1, 2, 3))]
    )


class Constants(nn.Module):
    """Parameters that are used as they are, reshaped, subtracted and divided by."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.plain, self.shaped = nn.Parameter(torch.full((1, 4, 1, 1), 0.5)), nn.Parameter(torch.full((4,), 2.0))
        self.less, self.over = nn.Parameter(torch.full((1, 1, 1), 0.25)), nn.Parameter(torch.tensor(3.0))

    def forward(self, x: Tensor) -> Tensor:
        return (self.conv(x) * self.plain * self.shaped.view(1, -1, 1, 1) - self.less.expand(4, 1, 1)) / self.over


def test_constants_that_a_model_trains_are_trained_in_the_student() -> None:
    model = Constants().eval()
    student = dfq.prepare(model, (3, 8, 8))
    images = torch.randn(4, 3, 8, 8)
    student(images).square().mean().backward()
    constants = [value for name, value in student.named_parameters() if name.endswith("constant")]
    assert len(constants) == 4 and all(value.grad is not None and bool(value.grad.any()) for value in constants)
    assert any(value is model.plain for value in constants)
    assert all(
        value.data_ptr() != model.shaped.data_ptr() for value in constants
    )  # what is computed is the student's own
    with torch.no_grad():
        for value in constants:
            value.mul_(1.5)
    dfq.calibrate(student, [images])
    with torch.no_grad():
        assert torch.equal(dfq.export_integers(student)(images), student.eval()(images))


def test_a_bias_lies_on_the_accumulators_grid() -> None:
    mult = torch.tensor([0.5, -0.25, 1e-3, 0.0, 1e-30])
    bias = torch.tensor([1.3, 1.3, -0.0126, 0.7, 5.0])
    expected = [1.5, 1.25, -0.013, 0.7, 5.0]  # the last two are no multiples that fp32 could tell apart
    assert on_accumulators(bias, mult).tolist() == pytest.approx(expected, rel=1e-6)
