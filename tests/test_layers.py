"""Every kind of layer, written in every way: trained, exact, in integers; zero tolerance between the last two."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import dfq
from dfq.engine import Engine
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
