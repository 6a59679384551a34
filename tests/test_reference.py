"""The references against independent arithmetic: hand-computed numbers, numpy in float32 and float64, gradcheck."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import dfq_kernels as k
from dfq_kernels.specs import batch_norm, fresh_range

pytestmark = pytest.mark.usefixtures("poison")
NAN, INF = float("nan"), float("inf")


@pytest.fixture(autouse=True)
def references(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tested here, where faster backends are there too."""
    monkeypatch.setattr("dfq_kernels.dispatch._FOR_ALL", "reference")


def numpy_fake_quant(x: np.ndarray, scale: float, zero_point: float, low: int, high: int) -> np.ndarray:
    """The formula, each operation rounded to float32 by numpy."""
    inv = np.float32(1) / np.float32(scale)
    q = np.clip(np.rint(x * inv + np.float32(zero_point)), np.float32(low), np.float32(high))
    return (q - np.float32(zero_point)) * np.float32(scale)


def test_fake_quant_ties_go_to_even_after_the_zero_point() -> None:
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, -2.5])
    assert k.fake_quant(x, 1.0, 0).tolist() == [0, 2, 2, 0, -2, -2]
    # with an odd zero point x + 1 is rounded: 1.5 -> 2, 2.5 -> 2, 3.5 -> 4, 0.5 -> 0, -0.5 -> 0, -1.5 -> -2
    assert k.fake_quant(x, 1.0, 1).tolist() == [1, 1, 3, -1, -1, -3]


def test_fake_quant_multiplies_by_the_reciprocal(random: torch.Generator) -> None:
    x = torch.randn(200_000, generator=random) * 40
    out = k.fake_quant(x, 0.3, 0, -128, 127)
    assert np.array_equal(out.numpy(), numpy_fake_quant(x.numpy(), 0.3, 0, -128, 127))
    halves = (torch.arange(1, 120) + 0.5) * torch.tensor(0.3)
    found = k.fake_quant(halves, 0.3, 0, -128, 127).numpy()
    assert np.array_equal(found, numpy_fake_quant(halves.numpy(), 0.3, 0, -128, 127))
    assert not np.array_equal(found, (torch.round(halves / 0.3).clamp(-128, 127) * torch.tensor(0.3)).numpy())


def test_fake_quant_bounds_and_special_values() -> None:
    x = torch.tensor([NAN, INF, -INF, 1e38, -1e38, 7.4, 7.6, -8.4, -8.6])
    out = k.fake_quant(x, 1.0, 0, -8, 7)
    assert math.isnan(out[0]) and out[1:].tolist() == [7, -8, 7, -8, 7, 7, -8, -8]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fake_quant_arithmetic_is_fp32(random: torch.Generator, dtype: torch.dtype) -> None:
    x = torch.randn(10_000, generator=random).to(dtype)
    expected = torch.from_numpy(numpy_fake_quant(x.float().numpy(), 0.013, 3, -128, 127)).to(dtype)
    assert torch.equal(k.fake_quant(x, 0.013, 3, -128, 127), expected)


def test_fake_quant_gradients_by_hand() -> None:
    """x / scale + 1 = 1.3, 2.9, 5, -7, 0.5 with q in [0, 3]: inside, inside, above, below, inside (rounds to 0)."""
    x = torch.tensor([0.15, 0.95, 2.0, -4.0, -0.25], requires_grad=True)
    scale = torch.tensor(0.5, requires_grad=True)
    zero_point = torch.tensor(1.0, requires_grad=True)
    out = k.fake_quant(x, scale, zero_point, 0, 3)
    assert out.tolist() == [0.0, 1.0, 1.0, -0.5, -0.5]
    grad = torch.tensor([1.0, 10.0, 100.0, 1000.0, 10000.0])
    grads = torch.autograd.grad(out, (x, scale, zero_point), grad)
    assert grads[0].tolist() == [1, 10, 0, 0, 10000]
    # inside (q - z) - x / scale: -0.3, 2 - 1.9, -1 + 0.5; outside q - z: 2, -1
    assert float(grads[1]) == pytest.approx(-0.3 * 1 + 0.1 * 10 + 2 * 100 - 1 * 1000 - 0.5 * 10000, rel=1e-6)
    assert float(grads[2]) == -0.5 * 1100


def test_fake_quant_gradient_with_a_given_scale() -> None:
    x = torch.tensor([0.15, 0.95, 2.0, -4.0, -0.25, NAN], requires_grad=True)
    (grad,) = torch.autograd.grad(k.fake_quant(x, 0.5, 1, 0, 3), x, torch.tensor([1.0, 10.0, 100.0, 1000.0, 1e4, 1e5]))
    assert grad.tolist() == [1, 10, 0, 0, 10000, 0]


def test_fake_quant_per_axis_equals_slices(random: torch.Generator) -> None:
    x = torch.randn(3, 4, 5, generator=random, requires_grad=True)
    scale = torch.tensor([0.1, 0.2, 0.3, 0.4], requires_grad=True)
    zero_point = torch.tensor([0.0, 1.0, -2.0, 3.0])
    out = k.fake_quant(x, scale, zero_point, -8, 7, axis=1)
    grad_x, grad_scale = torch.autograd.grad(out.square().sum(), (x, scale))
    for channel in range(4):
        part = x[:, channel].detach().requires_grad_()
        one = scale[channel].detach().requires_grad_()
        expected = k.fake_quant(part, one, zero_point[channel], -8, 7)
        assert torch.equal(out[:, channel], expected)
        grads = torch.autograd.grad(expected.square().sum(), (part, one))
        assert torch.equal(grad_x[:, channel], grads[0])
        torch.testing.assert_close(grad_scale[channel], grads[1])


def test_observe_fake_quant_by_hand() -> None:
    ranges = fresh_range()
    x = torch.tensor([-1.0, 0.0, 2.0])
    out = k.observe_fake_quant(x, **ranges, quant_min=0, quant_max=15)
    assert [float(ranges[name]) for name in ("running_min", "running_max")] == [-1, 2]
    assert float(ranges["scale"]) == pytest.approx(0.2) and float(ranges["zero_point"]) == 5
    torch.testing.assert_close(out, x)
    k.observe_fake_quant(torch.tensor([-3.0, 12.0]), **ranges, averaging_constant=0.1, quant_min=0, quant_max=15)
    assert float(ranges["running_min"]) == pytest.approx(-1.2) and float(ranges["running_max"]) == pytest.approx(3.0)
    assert float(ranges["scale"]) == pytest.approx(0.28) and float(ranges["zero_point"]) == 4  # rne(4.2857)


def test_observe_fake_quant_zero_point_rounds_to_nearest() -> None:
    ranges = fresh_range()
    k.observe_fake_quant(torch.tensor([-1.7, 1.3]), **ranges, quant_min=0, quant_max=15)  # -lo / scale = 8.5
    assert float(ranges["zero_point"]) in (8, 9)
    ranges = fresh_range()
    k.observe_fake_quant(torch.tensor([-1.78, 1.22]), **ranges, quant_min=0, quant_max=15)  # 8.9
    assert float(ranges["zero_point"]) == 9


def test_observe_fake_quant_keeps_zero_in_the_range() -> None:
    for shift, expected in ((5.0, (0.0, 6.0)), (-5.0, (-5.0, 0.0))):
        ranges = fresh_range()
        k.observe_fake_quant(torch.tensor([0.0, 1.0]) + shift, **ranges, quant_min=0, quant_max=10)
        assert float(ranges["scale"]) == pytest.approx((expected[1] - expected[0]) / 10)


def test_observe_fake_quant_symmetric_takes_the_larger_side() -> None:
    ranges = fresh_range()
    k.observe_fake_quant(torch.tensor([-7.0, 3.0]), **ranges, quant_min=-8, quant_max=7, symmetric=True)
    assert float(ranges["scale"]) == 1.0 and float(ranges["zero_point"]) == 0.0


def test_observe_fake_quant_refuses_to_learn_from_non_finite_batches() -> None:
    ranges = fresh_range(-1.0, 1.0)
    out = k.observe_fake_quant(torch.tensor([NAN, 5.0]), **ranges)
    assert [float(ranges[name]) for name in ("running_min", "running_max")] == [-1, 1]
    assert math.isnan(out[0]) and float(out[1]) == pytest.approx(1.0, abs=0.01)


def test_degenerate_range_has_the_stated_floor() -> None:
    ranges = fresh_range()
    out = k.observe_fake_quant(torch.zeros(4), **ranges)
    assert float(ranges["scale"]) == 2.0**-63 and out.tolist() == [0.0] * 4
    _, (scale,) = k.fake_quant_weights([torch.zeros(2, 3)], 4)
    assert scale.tolist() == [2.0**-63] * 2


def test_a_range_wider_than_fp32_is_cut_to_one_of_finite_width() -> None:
    ranges = fresh_range()
    out = k.observe_fake_quant(torch.tensor([-2e38, 0.0, 2e38]), **ranges)
    assert (float(ranges["running_min"]), float(ranges["running_max"])) == (-(2.0**126), 2.0**126)
    assert float(ranges["scale"]) == pytest.approx(2.0**127 / 255) and bool(out.isfinite().all())


@pytest.mark.parametrize("scale", [0.0, -0.1, NAN])
def test_a_scale_that_is_not_above_0_gives_nan_and_no_gradient(scale: float) -> None:
    x = torch.tensor([-1.0, 0.0, 1.0], requires_grad=True)
    out = k.fake_quant(x, torch.tensor(scale), 0.0, -8, 7)
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert bool(out.isnan().all()) and grad.tolist() == [0.0] * 3


def test_fake_quant_weights_by_hand() -> None:
    weight = torch.tensor([[-7.0, 3.4, 0.6], [0.35, -0.1, 0.02]])
    (out,), (scale,) = k.fake_quant_weights([weight], 4)
    torch.testing.assert_close(scale, torch.tensor([1.0, 0.05]))
    torch.testing.assert_close(out, torch.tensor([[-7.0, 3.0, 1.0], [0.35, -0.1, 0.0]]))


@pytest.mark.parametrize("bits", range(2, 9))
def test_fake_quant_weights_never_clip_and_pass_the_gradient(random: torch.Generator, bits: int) -> None:
    weight = torch.randn(8, 3, 3, 3, generator=random, requires_grad=True)
    (out,), (scale,) = k.fake_quant_weights([weight], bits)
    assert bool(((out - weight).abs().flatten(1).amax(1) <= scale * 0.5001).all())
    grad = torch.randn(out.shape, generator=random)
    assert torch.equal(torch.autograd.grad(out, weight, grad)[0], grad)


def test_bn_stats_of_a_far_mean(random: torch.Generator) -> None:
    x = torch.randn(64, 3, 32, 32, generator=random) + 1e4
    mean, var = k.bn_stats(x)
    exact = x.double()
    torch.testing.assert_close(mean.double(), exact.mean((0, 2, 3)), rtol=1e-6, atol=0)
    torch.testing.assert_close(var.double(), exact.var((0, 2, 3), correction=0), rtol=1e-4, atol=0)


def test_bn_stats_variance_is_biased() -> None:
    mean, var = k.bn_stats(torch.tensor([[1.0, 0.0], [3.0, 0.0]]))
    assert mean.tolist() == [2, 0] and var.tolist() == [1, 0]


def test_gradients_of_statistics_are_the_derivatives(random: torch.Generator) -> None:
    x = torch.randn(3, 2, 4, dtype=torch.float64, generator=random, requires_grad=True)
    assert torch.autograd.gradcheck(k.bn_stats, x)


@pytest.mark.parametrize("activation", [None, "relu", "relu6"])
def test_bn_act_stats_is_batch_norm_and_its_derivative(random: torch.Generator, activation: str | None) -> None:
    x = (torch.randn(4, 3, 5, dtype=torch.float64, generator=random) * 4).requires_grad_()
    parameters = {name: value.double() for name, value in batch_norm(random, 3).items()}

    def call(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return k.bn_act_stats(x, **parameters, activation=activation, eps=0.3)

    expected = torch.nn.functional.batch_norm(
        x, parameters["running_mean"], parameters["running_var"], parameters["weight"], parameters["bias"], eps=0.3
    )
    expected = {None: expected, "relu": expected.relu(), "relu6": expected.clamp(0, 6)}[activation]
    if activation == "relu6":
        assert bool((expected == 6).any()), "no value above 6: the case proves nothing"
    out, mean, var = call(x)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(mean, x.mean((0, 2)))
    torch.testing.assert_close(var, x.var((0, 2), correction=0))
    assert torch.autograd.gradcheck(call, x)


def wide_range() -> dict[str, torch.Tensor]:
    """A grid so fine that fake quantization is nearly the identity: then torch's own gradients are the oracle."""
    ranges = {name: value.double() for name, value in fresh_range(-50.0, 50.0, scale=1e-5).items()}
    return ranges | {"scale": torch.tensor(1e-5, dtype=torch.float64)}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("activation", [None, "relu", "relu6"])
def test_bn_act_fake_quant_gradients(random: torch.Generator, training: bool, activation: str | None) -> None:
    x = (torch.randn(4, 3, 6, dtype=torch.float64, generator=random) * 4 + 1).requires_grad_()
    stored = {name: value.double() for name, value in batch_norm(random, 3).items()}
    weight, bias = (stored.pop("weight") * 3).requires_grad_(), stored.pop("bias").requires_grad_()
    statistics = {name: value.clone() for name, value in stored.items()}
    out = k.bn_act_fake_quant(
        x, weight, bias, **stored, **wide_range(), training=training, observe=False, activation=activation,
        quant_min=-(2**23), quant_max=2**23, eps=0.1, momentum=0.25,
    )  # fmt: skip
    expected = torch.nn.functional.batch_norm(
        x, statistics["running_mean"], statistics["running_var"], weight, bias, training, 0.25, 0.1
    )
    expected = {None: expected, "relu": expected.relu(), "relu6": expected.clamp(0, 6)}[activation]
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
    for name, value in statistics.items():  # moved in training, by momentum and with the unbiased variance
        torch.testing.assert_close(stored[name], value)
    grad = torch.randn(out.shape, dtype=torch.float64, generator=random)
    found = torch.autograd.grad(out, (x, weight, bias), grad)
    wanted = torch.autograd.grad(expected, (x, weight, bias), grad)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_bn_act_fake_quant_is_the_composition(random: torch.Generator) -> None:
    x = torch.randn(4, 5, 6, 7, generator=random)
    parameters = batch_norm(random, 5)
    ranges, apart = fresh_range(), fresh_range()
    out = k.bn_act_fake_quant(x, **parameters, **ranges, quant_max=15)
    y, _, _ = k.bn_act_stats(x, **parameters)
    assert torch.equal(out, k.observe_fake_quant(y, **apart, quant_max=15))
    assert all(torch.equal(ranges[name], apart[name]) for name in ranges)


def test_bn_act_fake_quant_learns_its_scale(random: torch.Generator) -> None:
    x = torch.randn(4, 5, 6, 7, generator=random)
    parameters = batch_norm(random, 5)
    scale = torch.tensor(0.1, requires_grad=True)
    ranges = fresh_range(0.0, 1.0) | {"scale": scale}
    out = k.bn_act_fake_quant(x, **parameters, **ranges, observe=False, quant_max=7)
    y, _, _ = k.bn_act_stats(x, **parameters)
    expected = k.fake_quant(y, scale, torch.tensor(0.0), 0, 7)
    assert torch.equal(out, expected)
    torch.testing.assert_close(
        torch.autograd.grad(out.square().sum(), scale), torch.autograd.grad(expected.square().sum(), scale)
    )


def test_bn_stat_loss_is_the_divergence_of_gaussians(random: torch.Generator) -> None:
    means, stored_means = (torch.randn(2, 6, generator=random, dtype=torch.float64)).unbind()
    variances, stored_vars = (torch.rand(2, 6, generator=random, dtype=torch.float64) + 0.1).unbind()
    found = k.bn_stat_loss([means], [variances], [stored_means], [stored_vars])
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(
        normal(means, variances.sqrt()), normal(stored_means, stored_vars.sqrt())
    )
    torch.testing.assert_close(found, expected.sum())
    means.requires_grad_(), variances.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda m, v: k.bn_stat_loss([m], [v], [stored_means], [stored_vars]), (means, variances)
    )


def test_bn_stat_loss_of_dead_channels_is_finite() -> None:
    mean, var = torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    loss = k.bn_stat_loss([mean], [var], [torch.ones(2)], [torch.tensor([0.0, 4.0])], eps=1e-2)
    loss.backward()
    # stored 0.01: (1 + 0.01) / 0.02 - 0 - 0.5; stored 4: (1 + 0.01) / 8 - 0.5 log(0.0025) - 0.5
    assert float(loss.detach()) == pytest.approx(50.0 + (1.01 / 8 - 0.5 * math.log(0.0025) - 0.5), rel=1e-5)
    assert var.grad.tolist() == [0.0, 0.0] and torch.isfinite(mean.grad).all()


def test_convolution_is_that_of_the_integers_times_the_scales(random: torch.Generator) -> None:
    """A loop over the taps in float64; the scales are in the values."""
    x = torch.randint(0, 16, (2, 4, 7, 8), generator=random, dtype=torch.float64)
    weight = torch.randint(-7, 8, (6, 2, 3, 2), generator=random, dtype=torch.float64)
    scale, bias = torch.rand(6, generator=random) + 0.1, torch.randn(6, generator=random)
    padded = torch.nn.functional.pad(x, (2, 2, 1, 1))
    acc = torch.zeros(2, 6, 3, 11)
    for c in range(6):
        for row in range(3):
            for column in range(2):
                seen = padded[:, c // 3 * 2 : c // 3 * 2 + 2, row * 2 : row * 2 + 5 : 2, column : column + 11]
                acc[:, c] += (seen * weight[c, :, row, column].reshape(2, 1, 1)).sum(1).float()
    expected = acc * (0.3 * scale).reshape(6, 1, 1) + bias.reshape(6, 1, 1)
    values = (x.float() * 0.3, torch.tensor(0.3), weight.float() * scale.reshape(6, 1, 1, 1), scale)
    settings = {"stride": (2, 1), "padding": (1, 2), "dilation": (2, 1), "groups": 2}
    torch.testing.assert_close(k.fake_quant_conv2d(*values, bias, **settings), expected, rtol=1e-5, atol=1e-5)
    half = k.fake_quant_conv2d(*values, bias, **settings, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert float((half.float() - expected).norm()) < 2**-8 * float(expected.norm())
