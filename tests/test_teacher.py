"""The teacher as the training steps call it is the teacher."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import dfq_kernels
from dfq.method.bn_stats import BnStatistics
from dfq.method.teacher import BatchNormAct, freeze, teacher_graph
from dfq.models import ModelSpec, build_model
from dfq.network import capture


class Forms(nn.Module):
    """Batch norms and activations in every form, shared and apart."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(6))
        self.plain = nn.BatchNorm2d(4, affine=False)
        self.relu, self.relu6 = nn.ReLU(inplace=True), nn.ReLU6()
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norms[0](x))
        x = F.relu6(x + self.norms[1](x).relu())
        y = self.norms[2](x)
        x = y + self.relu6(y)  # y has a second reader
        x = self.relu(self.norms[3](x)) + self.norms[4](x)  # an activation that is called twice
        x = self.relu6(self.norms[5](x)) + self.plain(x)
        return self.head(x.mean((2, 3)))


def forms(random: torch.Generator) -> nn.Module:
    net = Forms().train()
    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm2d) and norm.affine:
            nn.init.normal_(norm.weight, 1, 0.5)
            nn.init.normal_(norm.bias)
    with torch.no_grad():
        net(2 * torch.randn(64, 4, 5, 5, generator=random) + 1)
    return freeze(net)


def graph_of(net: nn.Module, x: Tensor, dtype: torch.dtype | None = None) -> nn.Module:
    return teacher_graph(capture(net, tuple(x.shape[1:])), dtype)


def images_of(random: torch.Generator) -> Tensor:
    return torch.randn(8, 4, 5, 5, generator=random).requires_grad_()


def test_the_fused_teacher_is_the_teacher(random: torch.Generator) -> None:
    net, x = forms(random), images_of(random)
    state, modules = {name: value.clone() for name, value in net.state_dict().items()}, list(net.modules())
    expected, graph = net(x), graph_of(net, x)
    found = graph(x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    (grad,), (expected_grad,) = (torch.autograd.grad(out.square().sum(), x) for out in (found, expected))
    torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-5)
    activations = [module.activation for module in graph.modules() if isinstance(module, BatchNormAct)]
    assert activations == ["relu", "relu", None, "relu", None, "relu6", None]
    assert list(net.modules()) == modules and all(torch.equal(net.state_dict()[name], state[name]) for name in state)


def test_its_statistics_are_the_teacher_s(random: torch.Generator) -> None:
    net, x = forms(random), images_of(random)
    losses = []
    for model in (net, graph_of(net, x)):
        with BnStatistics(model) as statistics:
            model(x)
            losses.append(statistics.loss())
            assert len(statistics.layers) == len(statistics._measured) == 7
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)
    grads = [torch.autograd.grad(loss, x)[0] for loss in losses]
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-6)


def test_weights_cast_once_change_no_bit(random: torch.Generator) -> None:
    """Under autocast, in logits and in the gradient of the images; the teacher keeps its own weights."""
    net, x = forms(random), images_of(random)
    results, casts = [], []
    for graph in (graph_of(net, x), graph_of(net, x, torch.bfloat16)):
        with torch.autocast("cpu", dtype=torch.bfloat16), Casts() as seen:
            logits = graph(x)
        results.append((logits, torch.autograd.grad(logits.float().square().sum(), x)[0]))
        casts.append(seen.count)
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
    layers = sum(isinstance(module, nn.Conv2d | nn.Linear) for module in net.modules())
    assert casts[0] - casts[1] >= layers > 0
    assert all(value.dtype == torch.float32 for value in net.parameters())


class Casts(TorchDispatchMode):
    """Counts conversions of type."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._to_copy.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("name", "activations"), [("wrn-16-1", 13), ("resnet20", 1 + 9), ("mobilenet-v2", 2 + 17 + 16), ("vgg11", 8)]
)
def test_known_teachers_are_fused(
    name: str, activations: int, random: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = freeze(build_model(ModelSpec(name, 3, 10, "cifar")))
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in net.modules())
    x = torch.randn(2, 3, 32, 32, generator=random)
    expected, graph, calls, operator = net(x), graph_of(net, x), [], dfq_kernels.bn_act_stats

    def counted(*args: object, activation: str | None, **keywords: object) -> object:
        calls.append(activation)
        return operator(*args, activation=activation, **keywords)  # type: ignore[arg-type]

    monkeypatch.setattr(dfq_kernels, "bn_act_stats", counted)
    torch.testing.assert_close(graph(x), expected, rtol=1e-4, atol=1e-4)
    assert len(calls) == norms and norms - calls.count(None) == activations


class Odd(nn.Module):
    """A small net that is written in an odd way."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.conv, self.bn, self.relu = kind, nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU()
        self.aux, self.head = nn.BatchNorm2d(4), nn.Linear(4, 3)
        self.register_buffer("factor", torch.full((4, 1, 1), 0.5))
        if kind == "a norm of a layer":
            self.conv.bn = self.bn

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "a branch on types" and isinstance(x, Tensor):
            x = (x - 1).relu()
        x = self.conv(x)
        if self.kind == "a buffer":
            x = x * self.factor
        if self.kind == "an operator in place":
            kept = x
            x *= 2
            x = x + kept
        x = self.conv.bn(x) if self.kind == "a norm of a layer" else self.bn(x)
        x = self.relu(x)
        if self.kind == "an unread head":
            self.aux(x)
        self.kept = x
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize(
    "kind", ["plain", "a buffer", "a branch on types", "an operator in place", "a norm of a layer", "an unread head"]
)
def test_odd_teachers_are_captured_whole(kind: str, random: torch.Generator) -> None:
    net, x = freeze(Odd(kind)), torch.randn(4, 1, 8, 8, generator=random).requires_grad_()
    modules, attributes = list(net.modules()), set(vars(net))
    graph = graph_of(net, x.detach())
    assert list(net.modules()) == modules and set(vars(net)) == attributes  # nothing of the capture stays
    grads = []
    for model in (net, graph):
        out = model(x)
        grads.append((out, torch.autograd.grad(out.square().sum(), x)[0]))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert len(norms_of(graph)) == 1  # a head that nobody reads has no statistics to match


def norms_of(graph: nn.Module) -> list[nn.Module]:
    return [module for module in graph.modules() if isinstance(module, BatchNormAct)]


class OwnNorm(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


def test_norms_of_a_class_of_their_own_are_measured(random: torch.Generator) -> None:
    net = freeze(nn.Sequential(nn.Conv2d(1, 4, 3), OwnNorm(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)))
    found = graph_of(net, torch.randn(2, 1, 8, 8, generator=random))
    assert len(BnStatistics(found).layers) == 2
