"""Each term against its definition, and where other projects went wrong: one-hot logits, hooks, the biased variance."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from dfq.method.bn_stats import BnStatistics
from dfq.method.losses import batch_negentropy, distillation, instance_entropy, label_cross_entropy
from dfq.method.teacher import freeze
from tests.conftest import small_net

TERMS = {
    "distillation": lambda logits: distillation(logits, torch.zeros_like(logits)),
    "distillation of a sure student": lambda logits: distillation(torch.zeros_like(logits), logits),
    "instance": instance_entropy,
    "batch": batch_negentropy,
    "label": lambda logits: label_cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long)),
}


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("logits", [[[1e4, 0.0, 0.0]], [[1e4, 0.0, 0.0], [0.0, 1e4, 0.0]]], ids=["one", "two"])
def test_terms_and_gradients_are_finite_for_one_hot_distributions(name: str, logits: list[list[float]]) -> None:
    tensor = torch.tensor(logits, requires_grad=True)
    loss = TERMS[name](tensor)
    loss.backward()
    assert torch.isfinite(loss.detach()) and torch.isfinite(tensor.grad).all()


def test_distillation_is_the_divergence_from_teacher_to_student(random: torch.Generator) -> None:
    teacher, student = torch.randn(2, 5, 7, generator=random)
    p, q = teacher.softmax(1), student.softmax(1)
    torch.testing.assert_close(distillation(teacher, student), (p * (p / q).log()).sum(1).mean())
    assert float(distillation(teacher, teacher)) == pytest.approx(0, abs=1e-7)


def test_entropies_of_known_distributions() -> None:
    even, sure = torch.zeros(6, 4), 1e3 * torch.eye(4)
    assert float(instance_entropy(even)) == pytest.approx(math.log(4))
    assert float(instance_entropy(sure)) == pytest.approx(0)
    assert float(batch_negentropy(sure)) == pytest.approx(-math.log(4))  # sure of each, all classes covered
    assert float(batch_negentropy(sure[:1])) == pytest.approx(0, abs=1e-6)


def test_statistics_are_those_of_the_norms_inputs_with_the_biased_variance(random: torch.Generator) -> None:
    net = freeze(small_net())
    x = torch.randn(8, 1, 12, 12, generator=random)
    with torch.no_grad(), BnStatistics(net) as statistics:
        net(x)
        found = float(statistics.loss())
    y = net.conv1(x)
    mean, var = y.mean((0, 2, 3)), y.var((0, 2, 3), correction=0)
    kl = ((mean - net.bn1.running_mean).square() + var) / (2 * net.bn1.running_var)
    kl = kl - 0.5 * (var / net.bn1.running_var).log() - 0.5
    only = nn.Sequential(net.conv1, net.bn1)
    with torch.no_grad(), BnStatistics(only) as statistics:
        only(x)
        assert float(statistics.loss()) == pytest.approx(float(kl.mean()), rel=1e-5)
    assert found > 0


def test_statistics_leave_nothing_behind(random: torch.Generator) -> None:
    net = freeze(small_net())
    x = torch.randn(4, 1, 12, 12, generator=random)
    before = net(x)
    state = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(RuntimeError, match="stop"), BnStatistics(net):
        net(x)
        raise RuntimeError("stop")
    assert all("forward" not in vars(module) and not module._forward_hooks for module in net.modules())
    assert torch.equal(net(x), before)
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in state.items())


def test_the_measured_forward_is_the_plain_one(random: torch.Generator) -> None:
    net = freeze(small_net())
    x = torch.randn(4, 1, 12, 12, generator=random)
    with BnStatistics(net):
        measured = net(x)
    torch.testing.assert_close(measured, net(x), rtol=1e-5, atol=1e-5)


def test_a_teacher_without_norms_is_refused() -> None:
    with pytest.raises(ValueError, match="teacher must have batch norms"):
        BnStatistics(nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4, 2)))
