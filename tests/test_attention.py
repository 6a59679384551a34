"""Where networks look: maps of known values, what is kept of a forward pass, students without a map in common."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dfq.config import RECIPES
from dfq.method.attention import attention, attention_distance, compares_maps, feature_maps
from dfq.method.objective import classifier
from dfq.method.trainer import DataFreeTraining
from tests.conftest import SMALL_RECIPE, SmallNet, small_net

CPU = torch.device("cpu")


def test_attention_is_a_unit_vector_of_what_is_positive() -> None:
    x = torch.tensor([[[3.0, -9.0], [0.0, 1.0]], [[0.0, 5.0], [-1.0, 0.0]]])[None]  # two channels of 2x2
    squares = torch.tensor([9.0, 25.0, 0.0, 1.0])
    torch.testing.assert_close(attention(x)[0], squares / squares.norm())
    torch.testing.assert_close(attention(7 * x), attention(x))


def test_a_map_without_anything_positive_has_a_finite_gradient() -> None:
    x = torch.full((1, 2, 3, 3), -1.0, requires_grad=True)
    distance = attention_distance({(3, 3): torch.rand(1, 5, 3, 3)}, {(3, 3): x})
    distance.backward()
    assert float(distance.detach()) == pytest.approx(1.0) and bool(x.grad.isfinite().all())


def test_the_distance_is_of_common_sizes_and_a_mean_over_images() -> None:
    left, right = torch.tensor([1.0, 0.0]).view(1, 1, 1, 2), torch.tensor([0.0, 2.0]).view(1, 1, 1, 2)
    same, apart = torch.cat([left, left]), torch.cat([left, right])
    teacher = {(1, 2): same, (4, 4): torch.rand(2, 3, 4, 4), (8, 8): torch.rand(2, 3, 8, 8)}
    student = {(1, 2): apart, (4, 4): teacher[4, 4], (2, 2): torch.rand(2, 3, 2, 2)}
    assert float(attention_distance(teacher, student)) == pytest.approx((0 + 2) / 2)


def test_the_last_map_of_every_size_is_kept_and_no_hook_stays() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 4, 3, padding=1)
            self.small = nn.Conv2d(4, 5, 3, 2, 1)
            self.head = nn.Linear(5, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.small(F.relu(self.second(self.first(x)))).mean((2, 3)))

    net, x = Net(), torch.rand(1, 1, 8, 8)
    with feature_maps(net) as maps:
        net(x)
        assert set(maps) == {(8, 8), (4, 4)}
        torch.testing.assert_close(maps[8, 8], net.second(net.first(x)))
    with feature_maps(net, wanted=False) as maps:
        net(x)
    assert not maps and not any(module._forward_hooks for module in net.modules())


def test_a_block_s_map_comes_before_those_of_its_layers() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU())
            self.norm, self.small = nn.BatchNorm2d(2), nn.Conv2d(2, 3, 3, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.small(F.relu(self.norm(self.block(x)))).mean((2, 3))

    net, x = Net().eval(), torch.rand(1, 1, 8, 8)
    with feature_maps(net) as maps:
        net(x)
        torch.testing.assert_close(maps[8, 8], net.block(x))
        torch.testing.assert_close(maps[4, 4], net.small(F.relu(net.norm(net.block(x)))))


def trained(student: nn.Module, weight: float, steps: int = 2) -> tuple[DataFreeTraining, dict[str, float]]:
    recipe = replace(RECIPES["distill"], batch_size=8, noise=8, width=8, warm_up=1, attention=weight)
    work = DataFreeTraining(
        small_net(), [student], recipe, quant=None, input_shape=(1, 12, 12), objective=classifier(4), steps=steps,
        seed=0, device=CPU, precision="fp32",
    )  # fmt: skip
    metrics = {}
    for index in range(work.total_steps):
        metrics = work.step(index)
    return work, {name: float(value) for name, value in metrics.items()}


def fresh() -> SmallNet:
    torch.manual_seed(0)
    return SmallNet()


def test_the_weight_moves_the_student_and_none_leaves_the_outputs_alone() -> None:
    (with_maps, terms), (without, rest) = trained(fresh(), 5.0), trained(fresh(), 0.0)
    assert 0 < terms["student0/attention"] < 5.0 * 4 and "student0/attention" not in rest
    assert not torch.equal(with_maps.students[0].conv1.weight, without.students[0].conv1.weight)


def test_a_student_without_a_common_size_is_said_and_trains() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(144, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x.flatten(1))

    with pytest.warns(UserWarning, match=r"students\[0\] has no feature map of a size of the teacher's"):
        _, terms = trained(Flat(), 5.0)
    assert "student0/attention" not in terms


def test_a_quantized_student_s_maps_are_compared() -> None:
    from tests.test_trainer import task

    work = task(replace(SMALL_RECIPE, attention=2.0))
    assert work.attentive == [True, True]
    for index in range(work.total_steps):
        metrics = work.step(index)
    assert float(metrics["student0/attention"]) > 0


def test_maps_of_one_size_are_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compares_maps(small_net(), fresh(), torch.rand(2, 1, 12, 12), "distill: students[0]")
