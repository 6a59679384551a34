"""Convolutions of fake-quantized values by their integers: exact sums, the gradients of the values, who calls them."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import dfq_kernels as k
from dfq.config import quant_config
from dfq.quant import prepare
from dfq.quant.modules import QuantConv2d
from dfq_kernels.dispatch import missing
from tests.conftest import small_net

REASON = missing("fake_quant_conv2d", "native", "cpu")
native_only = pytest.mark.skipif(REASON is not None, reason=str(REASON))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Operands = dict[str, Any]


@st.composite
def convolutions(draw: Any) -> tuple[Operands, Tensor, Tensor]:
    """Arguments of any shape, and the integers that they stand for."""
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    inner, outer = draw(st.sampled_from([1, 2, 4, 5, 8, 16])), draw(st.sampled_from([1, 3, 8, 17]))
    kernel = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    geometry = {
        "stride": (draw(st.integers(1, 2)), draw(st.integers(1, 3))), "padding": draw(st.integers(0, 2)),
        "dilation": draw(st.integers(1, 2)), "groups": groups,
    }  # fmt: skip
    sides = draw(st.integers(7, 10)), draw(st.integers(7, 19))
    dtype = draw(st.sampled_from(DTYPES))
    low, high = draw(st.sampled_from([(0, 15), (-7, 120)] + [(-n, 255 - n) for n in (0, 1, 128, 200, 255)]))
    if dtype == torch.bfloat16:
        low, high = max(low, -127), min(high, 127)
    x = torch.randint(low, high + 1, (draw(st.integers(1, 3)), inner * groups, *sides), generator=random)
    weight = torch.randint(-128, 128, (outer * groups, inner, *kernel), generator=random)
    scale = torch.rand(len(weight), generator=random) + 0.01
    operands = {
        "x": (x * 0.0123).to(dtype), "x_scale": torch.tensor(0.0123), "weight": weight * scale.reshape(-1, 1, 1, 1),
        "weight_scale": scale, "bias": torch.randn(len(weight), generator=random) if draw(st.booleans()) else None,
        "dtype": draw(st.sampled_from([None, *DTYPES])), **geometry,
    }  # fmt: skip
    return operands, x, weight


@native_only
@settings(max_examples=150, deadline=None)
@given(convolution=convolutions())
def test_the_sums_are_exact(convolution: tuple[Operands, Tensor, Tensor]) -> None:
    """bf16 and fp16 do not hold the values, but up to 127 and 255 the integers are still the nearest ones."""
    operands, x, weight = convolution
    geometry = {name: operands[name] for name in ("stride", "padding", "dilation", "groups")}
    acc = F.conv2d(x.double(), weight.double(), **geometry).float()
    mult = operands["x_scale"] * operands["weight_scale"]
    expected = acc * mult.reshape(-1, 1, 1)
    if operands["bias"] is not None:
        expected = expected + operands["bias"].reshape(-1, 1, 1)
    found = k.fake_quant_conv2d(**operands, backend="native")
    assert torch.equal(found, expected.to(operands["dtype"] or operands["x"].dtype))


@native_only
def test_an_image_unlike_the_first_is_done_again() -> None:
    """Of the first image all integers are above 127, of the second all are below 0, then a span that is no byte."""
    x = torch.stack([torch.full((4, 5, 5), 180.0), torch.full((4, 5, 5), -70.0)])
    weight, one = torch.ones(3, 4, 3, 3), torch.ones(())
    for span in (x, x.flip(0), x + torch.tensor([70.0, 0.0]).reshape(2, 1, 1, 1)):
        found = k.fake_quant_conv2d(span, one, weight, one, backend="native")
        assert torch.equal(found, F.conv2d(span, weight))


@native_only
def test_bf16_that_does_not_say_which_integer_it_was_is_convolved_as_it_is() -> None:
    """172 * 0.0123 becomes 2.109375, which is nearer to 171 * 0.0123."""
    x = (torch.arange(256.0).reshape(1, 1, 16, 16) * 0.0123).bfloat16()
    one = torch.ones(1, 1, 1, 1)
    found = k.fake_quant_conv2d(x, torch.tensor(0.0123), one, one[0, 0, 0], dtype=torch.float32, backend="native")
    assert torch.equal(found, x.float())


@native_only
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("learned", [("x",), ("weight",), ("bias",), ("x", "weight", "bias")], ids=str)
@pytest.mark.parametrize("fast", [True, False])
def test_gradients_are_those_of_the_values(
    dtype: torch.dtype, learned: tuple[str, ...], fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a processor that multiplies bf16 fast, and on one that does not."""
    monkeypatch.setattr(import_module("dfq_kernels.fake_quant_conv2d.values"), "FAST_AT_BF16", fast)
    random = torch.Generator().manual_seed(0)
    values = {
        "x": torch.randint(0, 16, (3, 8, 9, 9), generator=random) * 0.25,
        "weight": torch.randint(-7, 8, (12, 4, 3, 3), generator=random) * 0.125,
        "bias": torch.randn(12, generator=random).to(torch.bfloat16).float(),
    }
    geometry: Any = {"stride": 2, "padding": 1, "groups": 2}
    results = []
    for ours in (True, False):
        tensors = {name: value.to(dtype).requires_grad_(name in learned) for name, value in values.items()}
        if ours:
            scales = {"x_scale": torch.tensor(0.25), "weight_scale": torch.tensor(0.125)}
            out = k.fake_quant_conv2d(**tensors, **scales, **geometry, backend="native")
        else:
            out = F.conv2d(tensors["x"], tensors["weight"], tensors["bias"], **geometry)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        results.append([out.detach(), *torch.autograd.grad(out, [tensors[name] for name in learned], grad)])
    for found, expected in zip(*results, strict=True):
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, rtol=4 * torch.finfo(dtype).eps, atol=1e-4)


@native_only
def test_a_backward_without_the_weights_does_not_make_their_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """A generator learns through its student: autograd itself leaves those gradients out, and so must a node."""
    native = import_module("dfq_kernels.fake_quant_conv2d.native")
    asked: list[tuple[bool, ...]] = []

    def backward(*arguments: Any) -> Any:
        asked.append(tuple(arguments[-1]))
        return whole(*arguments)

    whole = native.backward
    monkeypatch.setattr(native, "backward", backward)
    x, one = torch.ones(2, 4, 5, 5, requires_grad=True), torch.ones(())
    weight, bias = torch.ones(3, 4, 3, 3, requires_grad=True), torch.ones(3, requires_grad=True)
    out = k.fake_quant_conv2d(x, one, weight, one, bias, backend="native").sum()
    out.backward(inputs=[x], retain_graph=True)
    assert asked == [(True, False, False)] and weight.grad is None and bias.grad is None
    out.backward()
    assert sorted(asked[1:]) == [(False, True, True), (True, False, False)]
    assert torch.equal(weight.grad, torch.full_like(weight, 18.0)) and torch.equal(bias.grad, torch.full_like(bias, 18))


def test_a_student_convolves_by_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    """All its layers whose input is quantized; autocast says which type their results have."""
    student = prepare(small_net(), quant_config("W4A4")).train()
    seen: list[Any] = []

    def call(x: Tensor, x_scale: Tensor, weight: Tensor, *rest: Any, **settings: Any) -> Tensor:
        seen.append(settings["dtype"])
        return whole(x, x_scale, weight, *rest, **settings)

    whole = k.fake_quant_conv2d
    monkeypatch.setattr(k, "fake_quant_conv2d", call)
    images = torch.randn(2, 1, 12, 12)
    layers = [module for module in student.modules() if isinstance(module, QuantConv2d)]
    logits = student(images)
    assert seen == [None] * len(layers) and logits.dtype == torch.float32
    seen.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        student(images)
    assert seen == [torch.bfloat16] * len(layers)
    seen.clear()
    layers[0].padding = "same"
    student(images)
    assert len(seen) == len(layers) - 1
