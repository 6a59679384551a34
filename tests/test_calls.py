"""Whole plain calls in one C function: the same as the long way, and never where somebody watches."""

from __future__ import annotations

import datetime
import gc
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import dfq_kernels as k
from dfq_kernels import dispatch, extension
from dfq_kernels.specs import all_specs
from tests.test_conformance import run

CALLS = extension.calls()
pytestmark = pytest.mark.skipif(CALLS is None, reason="no native module, or torch is older than 2.10")
ONE, ZERO = torch.tensor(0.1), torch.tensor(0.0)


def fake_quant(x: Tensor, *rest: Any) -> Any:
    assert CALLS is not None
    return CALLS.fake_quant(x, *(rest or (ONE, ZERO, -8, 7, None)))


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each whole call that was tried was done."""
    done: list[bool] = []

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            result = function(*arguments)
            done.append(result is not None)
            return result

        return call

    functions = {name: counted(getattr(CALLS, name)) for name in ("fake_quant", "mask_backward", "bn_stats")}
    monkeypatch.setattr(extension, "calls", lambda: SimpleNamespace(**functions))
    return done


@pytest.mark.parametrize("op", ["fake_quant", "bn_stats"])
def test_the_same_as_the_long_way(op: str, answers: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    spec = all_specs()[op]
    whole = [run(spec, case, "native", "cpu") for case in spec.cases]
    assert sum(answers) >= len(spec.cases) // 2
    monkeypatch.setattr(extension, "calls", lambda: None)
    for case, found in zip(spec.cases, whole, strict=True):
        for name, value in run(spec, case, "native", "cpu").items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=0, equal_nan=True, check_stride=True)


def test_what_a_plain_call_gives() -> None:
    x = torch.randn(4, 6, 5, 5)
    (out, inside), record = fake_quant(x)
    assert (
        inside is None and record is False and torch.equal(out, k.fake_quant(x, ONE, ZERO, -8, 7, backend="reference"))
    )
    (out, inside), record = fake_quant(x.clone().requires_grad_())
    assert (
        record is True
        and not out.requires_grad
        and inside.dtype == torch.uint8
        and inside.numel() == (600 + 15) // 16 * 2
    )
    with torch.no_grad():
        assert fake_quant(x.clone().requires_grad_())[1] is False
    (out, _), record = fake_quant(x, ONE.clone().requires_grad_(), ZERO, -8, 7, None)
    assert record is True
    last = x.contiguous(memory_format=torch.channels_last)
    (out, _), _ = fake_quant(last, torch.rand(6) + 0.1, torch.zeros(6), -8, 7, -3)
    assert out.stride() == last.stride()
    with forward_ad.dual_level():
        assert fake_quant(x)[1] is True


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class WatchingFunctions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("watch", [Watching, torch.profiler.profile], ids=["dispatch mode", "profiler"])
def test_who_watches_sees_every_operator(watch: Callable[[], Any], answers: list[bool]) -> None:
    x = torch.randn(3, 4, 5, 5)
    with watch():
        k.fake_quant(x, ONE, ZERO)
        k.bn_stats(x)
    assert answers == [False, False]
    torch.func.vmap(lambda row: answers.append(fake_quant(row) is not None) or row)(x)
    torch.jit.trace(lambda row: answers.append(fake_quant(row) is not None) or row, x, check_trace=False)
    assert set(answers) == {False} and len(answers) == 4
    with WatchingFunctions():
        assert torch.equal(k.fake_quant(x, ONE, ZERO), k.fake_quant(x, ONE, ZERO, backend="reference"))


class Subclass(torch.Tensor):
    """Somebody's own kind of tensor."""


def shrunk(x: Tensor) -> Tensor:
    x.untyped_storage().resize_(x.nbytes - 4)
    return x


NOT_PLAIN: dict[str, Callable[[Tensor], tuple[Any, ...]]] = {
    "subclass": lambda x: (x.as_subclass(Subclass), ONE, ZERO, -8, 7, None),
    "no tensor": lambda x: (x.tolist(), ONE, ZERO, -8, 7, None),
    "float64": lambda x: (x.double(), ONE, ZERO, -8, 7, None),
    "integers": lambda x: (x.int(), ONE, ZERO, -8, 7, None),
    "complex": lambda x: (x.cfloat(), ONE, ZERO, -8, 7, None),
    "sparse": lambda x: (x.to_sparse(), ONE, ZERO, -8, 7, None),
    "meta": lambda x: (x.to("meta"), ONE, ZERO, -8, 7, None),
    "no elements": lambda x: (x[:0], ONE, ZERO, -8, 7, None),
    "a slice": lambda x: (x[:, ::2], ONE, ZERO, -8, 7, None),
    "transposed": lambda x: (x.transpose(0, 1), ONE, ZERO, -8, 7, None),
    "expanded": lambda x: (x[:1].expand(3, *x.shape[1:]), ONE, ZERO, -8, 7, None),
    "negated by a flag": lambda x: (torch._neg_view(x), ONE, ZERO, -8, 7, None),
    "shrunk": lambda x: (shrunk(x), ONE, ZERO, -8, 7, None),
    "scale a float": lambda x: (x, 0.1, ZERO, -8, 7, None),
    "scale of float64": lambda x: (x, ONE.double(), ZERO, -8, 7, None),
    "scales without an axis": lambda x: (x, torch.ones(6), torch.zeros(6), -8, 7, None),
    "scales of another axis": lambda x: (x, torch.ones(6), torch.zeros(6), -8, 7, 0),
    "scales of two axes": lambda x: (x, torch.ones(6, 1), torch.zeros(6, 1), -8, 7, 1),
    "scale shrunk": lambda x: (x, shrunk(torch.ones(1)), ZERO, -8, 7, None),
    "zero point a slice": lambda x: (x, torch.ones(6), torch.zeros(12)[::2], -8, 7, 1),
    "axis too large": lambda x: (x, torch.ones(6), torch.zeros(6), -8, 7, 4),
    "axis too small": lambda x: (x, torch.ones(6), torch.zeros(6), -8, 7, -5),
    "axis a bool": lambda x: (x, torch.ones(6), torch.zeros(6), -8, 7, True),
    "bounds crossed": lambda x: (x, ONE, ZERO, 7, -8, None),
    "a bound too large": lambda x: (x, ONE, ZERO, -8, 2**23 + 1, None),
    "a bound beyond 64 bits": lambda x: (x, ONE, ZERO, -8, 2**70, None),
    "a bound a float": lambda x: (x, ONE, ZERO, -8.0, 7, None),
    "an argument missing": lambda x: (x, ONE, ZERO, -8, 7),
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_PLAIN)
def test_what_is_not_plain_goes_the_long_way(name: str) -> None:
    assert fake_quant(torch.randn(3, 6, 4, 4)) is not None
    assert fake_quant(*NOT_PLAIN[name](torch.randn(3, 6, 4, 4))) is None


def test_backwards_that_are_not_plain() -> None:
    assert CALLS is not None
    x = torch.randn(2, 3, 4, 4)
    (_, inside), _ = fake_quant(x.clone().requires_grad_())
    assert CALLS.mask_backward(x, inside, x.stride()) is not None
    for grad_out, bits, stride in [
        (x.contiguous(memory_format=torch.channels_last), inside, x.stride()),
        (x, inside[:-1], x.stride()),
        (x, inside.to(torch.uint16), x.stride()),
        (x, inside, list(x.stride())),
        (x, inside, x.stride()[1:]),
        (torch._neg_view(x), inside, x.stride()),
        (torch._efficientzerotensor(x.shape), inside, x.stride()),
        (x.double(), inside, x.stride()),
    ]:
        assert CALLS.mask_backward(grad_out, bits, stride) is None
    assert CALLS.bn_stats(x[0, 0, 0]) is None and CALLS.bn_stats(x[:0]) is None


@pytest.mark.parametrize("op", ["fake_quant", "bn_stats", "observe_fake_quant"])
def test_values_negated_by_a_flag(op: str) -> None:
    """The imaginary part of a conjugate is one."""
    values = torch.randn(4, 5, 6)
    x = torch.complex(values, -values).conj().imag
    assert x.is_neg() and torch._neg_view(-values).is_neg()
    for negated in (x, torch._neg_view(-values)):
        if op == "observe_fake_quant":
            ranges = [
                (torch.tensor(torch.inf), torch.tensor(-torch.inf), torch.ones(()), torch.zeros(())) for _ in "12"
            ]
            found, expected = (k.observe_fake_quant(v, *r) for v, r in zip((negated, values), ranges, strict=True))
        else:
            arguments = (ONE, ZERO) if op == "fake_quant" else ()
            found, expected = (getattr(k, op)(v, *arguments) for v in (negated, values))
        pairs = zip(found, expected, strict=True) if op == "bn_stats" else [(found, expected)]
        assert all(torch.equal(one, other) for one, other in pairs)
    leaf = values.clone().requires_grad_()
    (grad,) = torch.autograd.grad(k.fake_quant(leaf, ONE, ZERO), leaf, torch._neg_view(-values))
    assert torch.equal(grad, torch.autograd.grad(k.fake_quant(leaf, ONE, ZERO), leaf, values)[0])


@pytest.mark.parametrize(
    "stand_in", [torch._efficientzerotensor, lambda shape: torch._to_functional_tensor(torch.ones(shape))]
)
def test_what_is_in_no_memory_is_refused(stand_in: Callable[[tuple[int, int]], Tensor]) -> None:
    x = stand_in((2, 3))
    assert type(x) is Tensor
    for call in (lambda: k.fake_quant(x, ONE, ZERO), lambda: k.bn_stats(x)):
        with pytest.raises(ValueError, match="x must have a storage of 24 bytes, got one of 0"):
            call()


def test_zeros_that_autograd_has_not_written_down() -> None:
    x = torch.randn(2, 3, requires_grad=True)
    k.fake_quant(x, ONE, ZERO).backward(torch._efficientzerotensor((2, 3)))
    assert x.grad is not None and torch.equal(x.grad, torch.zeros(2, 3))


def test_a_torch_whose_table_is_another_goes_the_long_way() -> None:
    attach = extension.native().calls.attach
    for table in (datetime.datetime_CAPI, None, 3):  # type: ignore[attr-defined]
        assert attach(table, torch, {"_current_level": -1}, ()) is False
    assert attach(Tensor.__dlpack_c_exchange_api__, torch, {}, ()) is False  # type: ignore[attr-defined]
    assert fake_quant(torch.randn(3)) is not None


def test_another_backend_is_not_passed_over(monkeypatch: pytest.MonkeyPatch, answers: list[bool]) -> None:
    x = torch.randn(2, 3, 4, 4)
    k.fake_quant(x, ONE, ZERO, backend="reference")
    monkeypatch.setattr(dispatch, "_FOR_ALL", "reference")
    k.fake_quant(x, ONE, ZERO)
    k.bn_stats(x)
    assert answers == []
    k.bn_stats(x, backend="native")
    assert answers == [True]


def test_an_older_torch_goes_the_long_way(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 3, 4, 4)
    expected = k.fake_quant(x, ONE, ZERO)
    monkeypatch.setattr(extension, "Tensor", type("Old", (), {}))
    extension.calls.cache_clear()
    try:
        assert extension.calls() is None and torch.equal(k.fake_quant(x, ONE, ZERO), expected)
    finally:
        extension.calls.cache_clear()


def test_references_are_given_back() -> None:
    """No tensor outlives its call."""
    x = torch.randn(64, 64)
    (out, inside), _ = fake_quant(x.requires_grad_())
    seen = [weakref.ref(t) for t in (x, out, inside)]
    del x, out, inside
    gc.collect()
    assert [ref() for ref in seen] == [None] * 3
