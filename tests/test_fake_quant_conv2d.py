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
from dfq.layers.convolution import QuantConv
from dfq.quant import prepare
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
    for span in (x, x.flip(0)):
        found = k.fake_quant_conv2d(span, one, weight, one, backend="native")
        assert torch.equal(found, F.conv2d(span, weight))


ONE = torch.ones(())
NO_BYTES = {
    "a span of 9 bits": (torch.arange(512.0).reshape(1, 4, 8, 16), ONE, torch.ones(3, 4, 3, 3), ONE),
    "NaN": (torch.full((1, 4, 8, 16), float("nan")), ONE, torch.ones(3, 4, 3, 3), ONE),
    # 172 * 0.0123 becomes 2.109375, which is nearer to 171 * 0.0123
    "bf16 that does not say which integer it was":
        ((torch.arange(256.0).reshape(1, 1, 16, 16) * 0.0123).bfloat16(), ONE * 0.0123, torch.ones(1, 1, 1, 1), ONE),
    "an infinite product of scales": (torch.ones(1, 4, 5, 5) * 3e38, ONE * 3e38, torch.ones(2, 4, 3, 3) * 3e38,
                                      ONE * 3e38),
    "a product of scales below the normal numbers":
        (torch.ones(1, 4, 5, 5) * 1e-25, ONE * 1e-25, torch.ones(2, 4, 3, 3) * 1e-18, ONE * 1e-18),
    "sums past int32": (torch.ones(1, 65900, 2, 1), ONE, torch.ones(1, 65900, 1, 1), ONE),
}  # fmt: skip


@native_only
@pytest.mark.parametrize("arguments", NO_BYTES.values(), ids=NO_BYTES)
def test_an_explicit_choice_refuses_what_is_no_bytes_and_a_free_one_convolves_it(
    arguments: tuple[Tensor, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="fake_quant_conv2d: (x|weight) must be"):
        k.fake_quant_conv2d(*arguments, dtype=torch.float32, backend="native")
    native = import_module("dfq_kernels.fake_quant_conv2d.native")
    monkeypatch.setattr(native, "leaves", lambda *_: False)  # these layers are small
    x, weight = arguments[0].clone().requires_grad_(), arguments[2].clone().requires_grad_()
    found = k.fake_quant_conv2d(x, arguments[1], weight, arguments[3], dtype=torch.float32)
    expected = F.conv2d(x.float(), weight)
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())
    grads = [torch.autograd.grad(out.sum(), [x, weight]) for out in (found, expected)]
    torch.testing.assert_close(grads[0], grads[1], equal_nan=True)


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
        kept = dtype if ours else torch.float32  # which holds the same values
        tensors = {name: value.to(kept).requires_grad_(name in learned) for name, value in values.items()}
        if ours:
            scales = {"x_scale": torch.tensor(0.25), "weight_scale": torch.tensor(0.125)}
            out = k.fake_quant_conv2d(**tensors, **scales, **geometry, backend="native")
        else:
            out = F.conv2d(tensors["x"], tensors["weight"], tensors["bias"], **geometry)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype).to(kept)
        results.append([out.detach(), *torch.autograd.grad(out, [tensors[name] for name in learned], grad)])
    for found, expected in zip(*results, strict=True):
        assert found.dtype == dtype  # some processors' bf16 and fp16 convolutions round sums on their way
        assert float((found.float() - expected).norm()) <= max(2 * torch.finfo(dtype).eps, 1e-6) * float(
            expected.norm()
        )


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


@native_only
def test_the_bias_may_change_before_the_backward() -> None:
    """No gradient reads it."""
    x, bias, one = torch.ones(2, 4, 20, 20), torch.zeros(3, requires_grad=True), torch.ones(())
    out = k.fake_quant_conv2d(x, one, torch.ones(3, 4, 1, 1), one, bias)
    with torch.no_grad():
        bias.add_(1)
    out.sum().backward()
    assert bias.grad.tolist() == [800.0] * 3


@native_only
@pytest.mark.parametrize("last", [(), ("x",), ("weight",), ("x", "weight")], ids=str)
@pytest.mark.parametrize("shape", [(2, 5, 6, 7), (1, 5, 1, 1), (2, 1, 4, 4), (1, 1, 3, 3)], ids=str)
def test_the_layout_is_torch_s(last: tuple[str, ...], shape: tuple[int, ...]) -> None:
    tensors = {"x": torch.ones(shape), "weight": torch.ones(8, shape[1], 3, 3)}
    tensors |= {name: tensors[name].to(memory_format=torch.channels_last) for name in last}
    one = torch.ones(())
    expected = F.conv2d(tensors["x"], tensors["weight"], padding=1)
    found = k.fake_quant_conv2d(tensors["x"], one, tensors["weight"], one, padding=1, backend="native")
    assert found.stride() == expected.stride() and torch.equal(found, expected)


@native_only
@pytest.mark.parametrize(
    ("count", "side", "channels", "groups", "chosen"),
    [(1, 16, 8, 1, "native"), (1, 15, 8, 1, "reference"), (4, 16, 32, 2, "native"), (4, 16, 32, 4, "reference"),
     (4, 16, 34, 2, "reference"), (4, 16, 32, 32, "reference")],
)  # fmt: skip
def test_layers_that_torch_is_faster_at_are_torch_s(
    count: int, side: int, channels: int, groups: int, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for backend in ("native", "reference"):
        module = import_module(f"dfq_kernels.fake_quant_conv2d.{backend}")
        forward = module.forward
        monkeypatch.setattr(module, "forward", lambda *a, b=backend, f=forward: (found.append(b), f(*a))[1])
    x, weight = torch.ones(count, channels, side, side), torch.ones(channels, channels // groups, 1, 1)
    k.fake_quant_conv2d(x, torch.ones(()), weight, torch.ones(()), groups=groups)
    assert found == [chosen]


def test_where_no_values_are_shapes_are() -> None:
    """A student on the meta device."""
    student = prepare(small_net(), (1, 12, 12), quant_config("W4A4")).train()
    expected = student(torch.randn(20, 1, 12, 12))
    found = student.to("meta")(torch.empty(20, 1, 12, 12, device="meta"))
    assert found.is_meta and found.shape == expected.shape


@pytest.mark.filterwarnings("ignore:`torch.jit.trace` is deprecated", "ignore::torch.jit.TracerWarning")
def test_a_training_student_can_be_traced() -> None:
    student, images = prepare(small_net(), (1, 12, 12), quant_config("W4A4")).train(), torch.randn(20, 1, 12, 12)
    assert torch.equal(torch.jit.trace(student, (images,), check_trace=False)(images), student(images))


def test_a_student_convolves_by_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    """All its layers whose input is quantized; autocast says which type their results have."""
    student = prepare(small_net(), (1, 12, 12), quant_config("W4A4")).train()
    seen: list[Any] = []

    def call(x: Tensor, x_scale: Tensor, weight: Tensor, *rest: Any, **settings: Any) -> Tensor:
        seen.append(settings["dtype"])
        return whole(x, x_scale, weight, *rest, **settings)

    whole = k.fake_quant_conv2d
    monkeypatch.setattr(k, "fake_quant_conv2d", call)
    images = torch.randn(2, 1, 12, 12)
    layers = [module for module in student.modules() if isinstance(module, QuantConv)]
    logits = student(images)
    assert seen == [None] * len(layers) and logits.dtype == torch.float32
    seen.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        student(images)
    assert seen == [torch.bfloat16] * len(layers)
    seen.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):  # which leaves float64 as it is
        student.double()(images.double())
    assert seen == [None] * len(layers)
