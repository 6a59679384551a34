"""Rounding that takes back what it has added: against plain rounding, against all choices, on layers of every kind."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn

from dfq.config import quant_config
from dfq.method import compensate as module
from dfq.method.analytic import analytic_ranges
from dfq.method.compensate import (
    compensate,
    compensated,
    covariance,
    descended,
    elimination,
    fitted_scale,
    nearest_that_rounds,
    rounded_in_order,
)
from dfq.method.noise import Moments
from dfq.quant import prepare
from dfq.quant.quantizers import fit_weights, weight_layers
from tests.conftest import small_net

STANDARD = Moments(torch.zeros(1), 1.0)


def rounded(weight: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    return (weight / scale[:, None]).round().clamp(low, high) * scale[:, None]


def error(off: Tensor, spread: Tensor) -> Tensor:
    """Of each output channel: the variance of what a change of its weights adds."""
    return torch.einsum("oi,ij,oj->o", off.double(), spread, off.double())


def correlated(inputs: int, random: torch.Generator) -> Tensor:
    mixed = torch.randn(inputs, inputs, generator=random) @ torch.randn(inputs, 4 * inputs, generator=random)
    return covariance(mixed[None])


def in_groups(weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return weight.double()[None], scale.double()[None]


def test_inputs_that_have_nothing_in_common_are_plain_rounding(random: torch.Generator) -> None:
    wanted, step = in_groups(torch.randn(5, 7, generator=random), torch.full((5,), 0.5))
    alone, plain = torch.eye(7).double()[None], (wanted / 0.5).round().clamp(-4, 3)
    found = rounded_in_order(wanted, *elimination(alone), step, -4, 3)
    assert torch.equal(found, plain)
    assert torch.equal(descended(torch.zeros_like(plain), wanted, alone, step, -4, 3), plain)


def test_each_part_is_nearer_and_none_nearer_than_the_best(random: torch.Generator) -> None:
    weight, spread = torch.randn(40, 4, generator=random).double(), correlated(4, random)
    scale = torch.full((40,), 0.8).double()
    wanted, step = in_groups(weight, scale)
    first = rounded_in_order(wanted, *elimination(spread), step, -2, 1)
    second = descended(first, wanted, spread, step, -2, 1)
    fitted = fitted_scale(second, wanted, spread, step)
    choices = 0.8 * torch.tensor(list(itertools.product(range(-2, 2), repeat=4))).double()
    best = torch.stack([error(choices - row, spread[0]).min() for row in weight])
    plain = error(rounded(weight, scale, -2, 1) - weight, spread[0])
    in_order, descent = (error(0.8 * found[0] - weight, spread[0]) for found in (first, second))
    whole = error(compensated(weight, spread, scale, -2, 1)[0] - weight, spread[0])
    assert bool((descent >= best - 1e-9).all())
    assert bool((descent <= in_order + 1e-9).all())
    assert float((in_order - best).mean()) < 0.6 * float((plain - best).mean())
    assert float((descent - best).mean()) < 0.7 * float((in_order - best).mean())
    better = error(second[0] * fitted[0, :, None] - weight, spread[0])
    assert bool((better <= descent + 1e-9).all())
    assert bool((whole <= better + 1e-6).all())
    for factor in (0.99, 1.01):
        assert bool((better <= error(second[0] * factor * fitted[0, :, None] - weight, spread[0]) + 1e-9).all())


def test_integers_that_are_all_zero_keep_their_scale() -> None:
    nothing, step = in_groups(torch.zeros(2, 3), torch.tensor([0.5, 0.25]))
    alone = torch.eye(3).double()[None]
    assert torch.equal(fitted_scale(nothing, nothing, alone, step), step)
    weight, scale = compensated(nothing[0].float(), alone, step[0].float(), -8, 7)
    assert not bool(weight.any()) and bool((scale > 0).all())


def test_weights_stay_next_to_what_they_were(random: torch.Generator) -> None:
    """From the middle of an integer's interval 200 steps do not reach another one: W2A4 ended 2 points lower."""
    weight, scale = torch.randn(50, 9, generator=random), torch.rand(50, generator=random) + 0.2
    integers = torch.randint(-2, 2, weight.shape, generator=random).float()
    found = nearest_that_rounds(weight, integers * scale[:, None], scale, -2, 1)
    assert torch.equal((found / scale[:, None]).round().clamp(-2, 1), integers)
    kept = (weight / scale[:, None]).round().clamp(-2, 1) == integers
    apart = (found - weight).abs() / scale[:, None]
    assert bool((apart[kept] <= 0.05 + 1e-5).all()) and 50 < int(kept.sum()) < 400
    off = (weight / scale[:, None] - integers).abs()
    assert bool((apart <= (off - 0.45).clamp(min=0) + 1e-5).all())


def test_weights_are_integers_times_their_scale(random: torch.Generator) -> None:
    found, scale = compensated(torch.randn(6, 9, generator=random), correlated(9, random), torch.rand(6) + 0.1, -4, 3)
    integers = found / scale[:, None]
    torch.testing.assert_close(integers, integers.round().clamp(-4, 3), rtol=0, atol=1e-5)


def test_blocks_change_nothing(random: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, scale, spread = torch.randn(6, 50, generator=random), torch.full((6,), 0.4), correlated(50, random)
    whole = compensated(weight, spread, scale, -4, 3)
    monkeypatch.setattr(module, "BLOCK", 8)
    torch.testing.assert_close(compensated(weight, spread, scale, -4, 3), whole, rtol=1e-4, atol=1e-5)


def test_groups_are_apart(random: torch.Generator) -> None:
    weight, scale = torch.randn(6, 9, generator=random), torch.rand(6, generator=random) + 0.2
    spreads = torch.cat([correlated(9, random) for _ in range(3)])
    together = compensated(weight, spreads, scale, -4, 3)
    for group in range(3):
        rows = slice(2 * group, 2 * group + 2)
        alone = compensated(weight[rows], spreads[group : group + 1], scale[rows], -4, 3)
        torch.testing.assert_close((together[0][rows], together[1][rows]), alone)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(4, 6, 3, 2, 1, bias=False), (4, 9, 9)),
        (nn.Conv2d(4, 8, (3, 1), dilation=2, groups=2, bias=False), (4, 9, 9)),
        (nn.Conv2d(4, 4, 4, padding="same", groups=4, bias=False), (4, 7, 7)),
        (nn.Conv1d(4, 6, 3, padding=1, bias=False), (4, 9)),
        (nn.Linear(5, 6, bias=False), (4, 5)),
    ],
)  # fmt: skip
def test_patches_are_what_the_weights_multiply(layer: nn.Module, shape: tuple[int, ...]) -> None:
    student = prepare(layer, shape, quant_config("W4A4"))
    ((name, _, weight),) = weight_layers(student)
    quantized, x = student.get_submodule(name), torch.randn(3, *shape)
    patches = quantized.patches(x, 10**6, torch.Generator())
    products = weight.reshape(patches.shape[0], -1, patches.shape[1]) @ patches  # groups, channels, samples
    wanted = quantized.accumulate(x, weight, None).movedim(quantized.channel_axis, 0)
    torch.testing.assert_close(products.flatten(0, 1), wanted.reshape(products.flatten(0, 1).shape))
    few = quantized.patches(x, 2, torch.Generator().manual_seed(0))
    assert few.shape[2] <= 3 * 2 * (1 if len(shape) > 2 or shape[0] == 3 else 4)


def test_a_network_s_layers_are_nearer_to_themselves() -> None:
    net = small_net()
    student = copy.deepcopy(prepare(net, (1, 12, 12), quant_config("W2A8")))
    fit_weights(student)
    analytic_ranges(student, STANDARD)
    before = {name: weight.detach().clone() for name, _, weight in weight_layers(student)}
    noise = torch.randn(64, 1, 12, 12, generator=torch.Generator().manual_seed(1))
    seen: dict[str, Tensor] = {}
    compensate(student, noise, seed=0)
    assert not any(layer._forward_pre_hooks for layer in student.modules())
    for name, layer, _ in weight_layers(student):
        student.get_submodule(name).register_forward_pre_hook(
            lambda layer, inputs, name=name: seen.update({name: layer.patches(inputs[0], 512, torch.Generator())})
        )
    with torch.no_grad(), module.batch_statistics(student, ranges=False):
        student(noise)
    better = 0
    for name, layer, weight in weight_layers(student):
        if layer.bits == 8:
            assert torch.equal(weight, before[name])
            continue
        old = before[name].flatten(1)
        spread, low, high = covariance(seen[name]), layer.quant_min, layer.quant_max
        mine = error(rounded(weight.detach().flatten(1), layer.scale, low, high) - old, spread[0]).sum()
        plain = error(rounded(old, layer.scale, low, high) - old, spread[0]).sum()
        assert float(mine) <= 1.02 * float(plain), name
        better += float(mine) < 0.9 * float(plain)
    assert better >= 2


def test_a_weight_of_two_layers_stays() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.conv = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3, padding=1)
            self.norm, self.head = nn.BatchNorm2d(4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(self.conv(self.conv(self.stem(x)))).mean((2, 3)))

    student = copy.deepcopy(prepare(Twice().eval(), (1, 12, 12), quant_config("W3A8")))
    fit_weights(student)
    analytic_ranges(student, STANDARD)
    before = [weight.detach().clone() for _, _, weight in weight_layers(student)]
    with pytest.warns(UserWarning, match=r"in conv \(another layer has .*\), conv_1 \(another layer has its weight\)$"):
        compensate(student, torch.randn(8, 1, 12, 12), seed=0)
    assert all(torch.equal(weight, old) for (_, _, weight), old in zip(weight_layers(student), before, strict=True))


def test_a_bias_takes_the_mean_back_where_there_is_no_batch_norm() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4))
    student = copy.deepcopy(prepare(net.eval(), (1, 12, 12), quant_config("W2A8")))
    fit_weights(student)
    analytic_ranges(student, STANDARD)
    layers = [student.get_submodule(name) for name, _, _ in weight_layers(student)]
    before, biases = copy.deepcopy(layers[1]), [layer.bias.detach().clone() for layer in layers]
    seen: list[Tensor] = []
    hook = layers[1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))  # after all others
    noise = torch.randn(64, 1, 12, 12) + 0.5
    compensate(student, noise, seed=0)
    hook.remove()
    quantizer = weight_layers(student)[1][1]
    with torch.no_grad():
        wanted = before.accumulate(seen[0], before.weight, before.bias).mean((0, 2, 3))
        found = layers[1].accumulate(seen[0], quantizer(layers[1].weight)[0], layers[1].bias).mean((0, 2, 3))
        plain = before.accumulate(seen[0], quantizer(before.weight)[0], before.bias).mean((0, 2, 3))
    torch.testing.assert_close(found, wanted, rtol=0.02, atol=0.01)
    assert float((plain - wanted).abs().max()) > 0.05
    assert not torch.equal(layers[1].bias, biases[1]) and torch.equal(layers[0].bias, biases[0])


def test_layers_with_very_many_inputs_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LARGEST", 10)
    student = copy.deepcopy(prepare(small_net(), (1, 12, 12), quant_config("W3A8")))
    fit_weights(student)
    analytic_ranges(student, STANDARD)
    before = [weight.detach().clone() for _, _, weight in weight_layers(student)]
    with pytest.warns(UserWarning, match=r"without compensation in .*conv.* \(over 10 inputs\)"):
        compensate(student, torch.randn(8, 1, 12, 12), seed=0)
    same = [torch.equal(weight, old) for (_, _, weight), old in zip(weight_layers(student), before, strict=True)]
    assert sum(same) >= 3  # those of 3x3 taps of 8 channels, and the edges, which have 8 bits


def test_a_transposed_convolution_is_named() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ConvTranspose2d(4, 4, 2, 2), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3))
    student = copy.deepcopy(prepare(net.eval(), (1, 12, 12), quant_config("W3A8")))
    fit_weights(student)
    analytic_ranges(student, STANDARD)
    with pytest.warns(UserWarning, match=r"without compensation in 1 \(what its weights multiply is not known\)$"):
        compensate(student, torch.randn(8, 1, 12, 12), seed=0)
