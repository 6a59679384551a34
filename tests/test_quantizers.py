"""Quantizers one at a time, the bits of edge layers, ReLU6, and what accuracy() is measured with."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dfq_kernels
from dfq.config import LayerBits, quant_config
from dfq.data.images import Images
from dfq.quant import freeze_ranges, prepare, quantizers
from dfq.quant.quantizers import WeightQuantizer, WeightQuantizers, weight_layers
from dfq.results.evaluate import accuracy
from tests.conftest import small_net
from tests.test_quant import calibrated


def test_two_bit_scales_start_where_the_error_is_least(random: torch.Generator) -> None:
    weight = torch.randn(6, 40, generator=random)

    def error(quantizer: WeightQuantizer) -> torch.Tensor:
        return (quantizer(weight)[0] - weight).detach().square().sum(1)

    for bits, better in ((2, True), (3, False)):
        measured, learned = WeightQuantizer(bits, 6, "symmetric"), WeightQuantizer(bits, 6, "symmetric")
        measured.measure(weight)
        learned.learn(weight)
        assert bool((error(learned) < 0.8 * error(measured)).all()) == better


def test_weights_in_autocast_s_type_change_no_bit(random: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where every layer multiplies the values: written in bf16, or cast by whoever multiplies them."""
    monkeypatch.setattr(dfq_kernels, "fake_quant_conv2d", partial(dfq_kernels.fake_quant_conv2d, backend="reference"))
    x = torch.randn(4, 1, 8, 8, generator=random)
    student = calibrated(small_net(), quant_config("W4A4", ranges="minmax"), x)
    results, types = [], []
    for dtype in (None, torch.bfloat16):
        monkeypatch.setattr(quantizers, "multiplied_type", lambda _, dtype=dtype: dtype)
        student.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = student.train()(x)
            (together,) = [module for module in student.modules() if isinstance(module, WeightQuantizers)]
            types.append(together(*[weight for _, _, weight in weight_layers(student)])[0][0].dtype)
        logits.float().square().sum().backward()
        grads = {name: value.grad for name, value in student.named_parameters()}
        assert all(grad is None or grad.dtype == torch.float32 for grad in grads.values())
        results.append(
            {"logits": logits.detach()} | {name: grad.clone() for name, grad in grads.items() if grad is not None}
        )
    assert types == [torch.float32, torch.bfloat16] and len(results[0]) > 4
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_affine_weights_reach_both_ends_of_their_range(random: torch.Generator) -> None:
    weight = torch.rand(6, 40, generator=random) * 3 - 1  # most of it positive: a zero point far from 0
    quantizer = WeightQuantizer(4, 6, "affine")
    out, scale = quantizer(weight)
    assert bool(((out - weight).abs() <= 0.51 * scale[:, None]).all())
    assert bool((quantizer.zero_point < -1).all()) and len(out[0].unique()) > 12


def test_first_and_last_layers_have_their_own_bits() -> None:
    config = replace(quant_config("W4A4"), first=LayerBits(7, 6), last=LayerBits(5, 3))
    student = prepare(small_net(), (1, 12, 12), config)
    bits = {name: quantizer.bits for name, quantizer, _ in weight_layers(student)}
    assert (bits["conv1"], bits["conv2"], bits["fc"]) == (7, 4, 5)
    modules = dict(student.named_modules())
    assert modules["quantizers.x_6"].bits == 6 and modules["calls.pool_adaptive_avg_pool2d.tail.quantizer"].bits == 3


@pytest.mark.parametrize("fused", [True, False])
def test_relu6_clamps_at_6(random: torch.Generator, fused: bool) -> None:
    class Six(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.relu, self.fc = nn.Conv2d(1, 4, 1), nn.ReLU6(), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.conv(x)
            x = self.relu(x if fused else x + x.mean([2, 3], keepdim=True))
            return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))

    model, x = Six(), 50 * torch.randn(64, 1, 4, 4, generator=random)
    expected = model(x)
    student = calibrated(model, quant_config("W8A8"), x)
    freeze_ranges(student)
    for found in (student.train()(x), student.eval()(x)):
        assert float((found - expected).detach().abs().max()) < 0.05 * float(expected.detach().abs().max())


def test_accuracy_is_of_the_evaluation_mode_and_gives_every_mode_back() -> None:
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Dropout(0.9), nn.Flatten(), nn.Linear(144, 4)).train()
    model[0].eval()
    pixels = torch.randint(0, 256, (40, 1, 12, 12), dtype=torch.uint8)
    images = Images(pixels, torch.zeros(40, dtype=torch.int64), (0.5,), (0.5,), 4)
    device = torch.device("cpu")
    with torch.no_grad():
        labels = copy.deepcopy(model).eval()(images.normalize(pixels)).argmax(1)
    before = copy.deepcopy(model.state_dict())
    assert accuracy(model, replace(images, labels=labels), device=device) == 100
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [model.training, model[0].training, model[1].training] == [True, False, True]
    with pytest.raises(ValueError, match="model must have 9 classes"):
        accuracy(model, replace(images, num_classes=9), device=device)
    assert model.training
