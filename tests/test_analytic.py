"""What is done to a network without an image: averages, scales of weights, statistics of batch norms."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import dfq
from dfq.config import quant_config
from dfq.data.images import load_images
from dfq.method.analytic import analytic_network, analytic_ranges
from dfq.method.noise import Moments
from dfq.models.embedded import load_teacher
from dfq.quant import freeze_ranges, prepare
from dfq.quant.quantizers import fit_weights, weight_layers
from dfq.results.evaluate import accuracy
from tests.conftest import small_net
from tests.test_rungs import moments_of

CPU = torch.device("cpu")
STANDARD = Moments(torch.zeros(1), 1.0)


def student_of(net: nn.Module, preset: str, shape: tuple[int, int, int] = (1, 12, 12)):
    return copy.deepcopy(prepare(net, shape, quant_config(preset)))


def test_an_average_has_the_range_of_its_input() -> None:
    student = student_of(small_net(), "W8A8")
    analytic_ranges(student, STANDARD)
    pooled = student.calls.pool_adaptive_avg_pool2d.tail.quantizer
    inputs = student.calls.add.tail.quantizer
    assert float(pooled.running_max) > 0.9 * float(inputs.running_max) > 0
    torch.testing.assert_close(pooled.scale, pooled.running_max / 255)


def test_noise_stays_between_black_and_white() -> None:
    student = student_of(small_net(), "W8A8")
    analytic_ranges(student, STANDARD, (torch.tensor([-0.5]), torch.tensor([1.5])))
    image = student.get_submodule("quantizers.x_8")
    assert float(image.running_min) == -0.5 and float(image.running_max) == 1.5


def test_weights_have_the_scale_of_least_squared_error() -> None:
    student = student_of(small_net(), "W3A8")
    fit_weights(student)
    for name, layer, weight in weight_layers(student):
        assert layer.source == ("moving" if layer.bits == 8 else "fixed"), name
        if layer.bits == 8:
            continue
        with torch.no_grad():
            best = (layer(weight)[0] - weight).square().sum()
            for factor in (0.9, 1.1):
                other = copy.deepcopy(layer)
                other.scale.mul_(factor)
                assert float((other(weight)[0] - weight).square().sum()) > float(best), name


def test_batch_norms_subtract_what_rounding_adds() -> None:
    net = small_net()
    noise = torch.randn(256, 1, 12, 12, generator=torch.Generator().manual_seed(9))
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # its statistics are those of the noise, not half way to them
    with torch.no_grad():
        net.train()(noise)
    net.eval()
    error = {}
    for name, make in (("ranges", analytic_ranges), ("network", analytic_network)):
        student = student_of(net, "W2A8")
        if name == "ranges":
            fit_weights(student)
        make(student, STANDARD)
        freeze_ranges(student)
        with torch.no_grad():
            error[name] = float((student.eval()(noise) - net(noise)).mean(0).abs().mean())
    assert error["network"] < 0.7 * error["ranges"]


def test_a_batch_norm_that_two_layers_share_stays_as_it_is() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3)
            self.norm, self.own, self.head = nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.relu(self.norm(self.second(torch.relu(self.norm(self.first(x))))))
            return torch.relu(self.own(self.head(x))).mean((2, 3))

    net = Shared().eval()
    student = student_of(net, "W3A3")
    analytic_network(student, STANDARD)
    means = {name: value for name, value in student.named_buffers() if name.endswith("running_mean")}
    changed = [bool(value.any()) for value in means.values()]  # all were 0
    assert sum(changed) == 1 and len(changed) >= 2, means


def test_a_run_leaves_the_model_s_batch_norms_alone(tmp_path: Path) -> None:
    net = small_net()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    dfq.quantize(net, input_shape=(1, 12, 12), preset="W3A3", effort="instant", out=tmp_path / "run")
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize(("preset", "least"), [("W4A4", 91.5), ("W2A4", 87.0), ("W2A2", 80.0)])
def test_few_bits_without_an_image(preset: str, least: float) -> None:
    teacher, images = load_teacher(), load_images("fashion-mnist", "test").head(1000)
    bounds = tuple((torch.tensor(end) - torch.tensor(images.mean)) / torch.tensor(images.std) for end in (0.0, 1.0))
    student = student_of(teacher, preset, (1, 32, 32))
    analytic_network(student, moments_of(load_teacher(), (1, 32, 32)), bounds)
    freeze_ranges(student)
    assert accuracy(student.eval(), images, device=CPU) > least
