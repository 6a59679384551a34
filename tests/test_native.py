"""The native module is built where it can be, and its kernels are the reference: at any size, layout and type, with any
number of threads, at every instruction-set level."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import dfq_kernels as k
from dfq_kernels import extension
from dfq_kernels.dispatch import missing
from dfq_kernels.fake_quant import native as fake_quant
from dfq_kernels.specs import all_specs, batch_norm, fresh_range
from tests.build_script import build_script
from tests.conftest import SEED
from tests.test_conformance import run

REASON = extension.missing("cpu")
native_only = pytest.mark.skipif(REASON is not None, reason=str(REASON))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def test_it_is_there_where_a_compiler_is() -> None:
    if any(shutil.which(name) for name in ("g++", "clang++", "c++")):
        assert REASON is None


@native_only
def test_it_is_built_from_these_sources() -> None:
    assert extension.native().sources in (build_script().sources_digest(), "unknown"), "older than csrc: make native"


def layouts(x: Tensor) -> dict[str, Tensor]:
    """The same values in several memory orders."""
    return {
        "contiguous": x,
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "transposed": x.transpose(0, 3).contiguous().transpose(0, 3),
        "gaps": torch.stack([x, -x], dim=-1).flatten(-2)[..., ::2],
        "misaligned": torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    }


shapes = st.tuples(st.integers(1, 5), st.integers(1, 40), st.integers(1, 40), st.integers(1, 40))


@native_only
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    shape=shapes,
    layout=st.sampled_from(["contiguous", "channels_last", "transposed", "gaps", "misaligned"]),
    dtype=st.sampled_from(DTYPES),
    axis=st.sampled_from([None, 0, 1, 2, 3]),
)
def test_fake_quant_at_any_size(shape: Any, layout: str, dtype: torch.dtype, axis: int | None) -> None:
    random = torch.Generator().manual_seed(sum(shape))
    values = layouts(torch.randn(shape, generator=random).to(dtype))[layout]
    channels = () if axis is None else (shape[axis],)
    scale, zero_point = torch.rand(channels, generator=random) * 0.2 + 0.05, torch.full(channels, 3.0)
    results = []
    for backend in ("native", "reference"):
        for learned in (False, True):
            x = values.clone(memory_format=torch.preserve_format).requires_grad_()
            step = scale.clone().requires_grad_(learned)
            out = k.fake_quant(x, step, zero_point, 0, 15, axis=axis, backend=backend)
            out.backward(torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype))
            results.append((out.detach(), x.grad, step.grad))
    for native, reference in zip(results[:2], results[2:], strict=True):
        assert torch.equal(native[0], reference[0]) and torch.equal(native[1], reference[1])
        if native[2] is not None:
            torch.testing.assert_close(native[2], reference[2], rtol=1e-4, atol=1e-3)


@native_only
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    shape=shapes,
    layout=st.sampled_from(["contiguous", "channels_last", "transposed", "gaps", "misaligned"]),
    dtype=st.sampled_from(DTYPES),
    training=st.booleans(),
    observe=st.booleans(),
    activation=st.sampled_from([None, "relu", "relu6"]),
)
def test_norms_at_any_size(
    shape: Any, layout: str, dtype: torch.dtype, training: bool, observe: bool, activation: str | None
) -> None:
    random = torch.Generator().manual_seed(sum(shape))
    if training and shape[0] * shape[2] * shape[3] == 1:
        return
    values = layouts((torch.randn(shape, generator=random) * 3 + 1).to(dtype))[layout]
    parameters, grad = batch_norm(random, shape[1]), torch.randn(shape, generator=random).to(dtype)
    results: dict[str, list[Tensor]] = {}
    for backend in ("native", "reference"):
        x = values.clone(memory_format=torch.preserve_format).requires_grad_()
        own = {name: value.clone() for name, value in parameters.items()}
        own["weight"].requires_grad_()
        ranges = fresh_range(0.0, 2.0, scale=0.15)
        out = k.bn_act_fake_quant(
            x, **own, **ranges, training=training, observe=observe, activation=activation, quant_max=15, backend=backend
        )
        out.backward(grad)
        frozen = {name: value.detach() for name, value in own.items()}
        y = values.clone(memory_format=torch.preserve_format).requires_grad_()
        teacher_out, mean, var = k.bn_act_stats(y, **frozen, activation=activation, backend=backend)
        (teacher_out.float().sum() + (mean * var).sum()).backward()
        statistics = [mean, var, own["running_mean"], own["running_var"], *ranges.values()]
        results[backend] = [*statistics, teacher_out.detach(), y.grad, own["weight"].grad, out.detach(), x.grad]
    close = {"rtol": 2e-2 if dtype != torch.float32 else 1e-4, "atol": 2e-2 if dtype != torch.float32 else 1e-3}
    for native, reference in zip(results["native"][:-2], results["reference"][:-2], strict=True):
        torch.testing.assert_close(native, reference, **close)
    for native, reference in zip(results["native"][-2:], results["reference"][-2:], strict=True):
        # a statistic that differs in its last bit may round a value to the next step, or move it across a bound
        other = ~torch.isclose(native, reference, **close)
        assert int(other.sum()) <= (max(2, other.numel() // 100) if training or observe else 0)


@native_only
@pytest.mark.parametrize("op", [op for op, spec in all_specs().items() if spec.differentiable])
@pytest.mark.parametrize("shape", [(65, 24, 33, 31), (65, 24, 32, 32)], ids=str)
def test_the_number_of_threads_changes_no_bit(op: str, shape: tuple[int, ...]) -> None:
    """At a size where every kernel splits its work, and where one thread writes past the caches but several do not."""
    generator, threads = torch.Generator().manual_seed(SEED), torch.get_num_threads()
    x = torch.randn(shape, generator=generator)
    assert x.nbytes >= 6 * 2**20 > x.nbytes / 2
    found = []
    for count in (1, 2, 3, 7):
        torch.set_num_threads(count)
        try:
            found.append(_all_results(op, x))
        finally:
            torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))


@native_only
def test_the_number_of_threads_changes_no_integer() -> None:
    """Few images are worked on together, many are shared out."""
    threads, found = torch.get_num_threads(), []
    specs = [spec for spec in all_specs().values() if not spec.differentiable]
    for count in (1, 2, 3, 7):
        torch.set_num_threads(count)
        try:
            results = [run(spec, case, "native", "cpu") for spec in specs for case in spec.cases]
            found.append([value for result in results for value in result.values()])
        finally:
            torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))


def _all_results(op: str, values: Tensor) -> list[Tensor]:
    """Outputs and gradients of a call on a large tensor, in both layouts."""
    results = []
    for layout in ("contiguous", "channels_last"):
        x = layouts(values)[layout].clone(memory_format=torch.preserve_format).requires_grad_()
        parameters = batch_norm(torch.Generator().manual_seed(1), x.shape[1])
        scale = torch.full((x.shape[1],), 0.1, requires_grad=True)
        if op == "fake_quant":
            outs: Any = [
                k.fake_quant(x, scale, 0.0 * scale.detach(), -8, 7, axis=1, backend="native"),
                k.fake_quant(x, 0.1, 0.0, -8, 7, backend="native"),
            ]
        elif op == "observe_fake_quant":
            outs = [k.observe_fake_quant(x, **fresh_range(), backend="native")]
        elif op == "fake_quant_weights":
            outs = k.fake_quant_weights([x, x * 2], 4, backend="native")[0]
        elif op == "bn_stats":
            outs = k.bn_stats(x, backend="native")
        elif op == "bn_act_stats":
            outs = k.bn_act_stats(x, **parameters, backend="native")
        elif op == "bn_act_fake_quant":
            outs = [k.bn_act_fake_quant(x, **parameters, **fresh_range(), training=True, backend="native")]
        elif op == "fake_quant_conv2d":
            outs = [k.fake_quant(x, 0.1, 0.0, -8, 7, backend="native")]
            weight = torch.randint(-8, 8, (16, x.shape[1], 3, 3), generator=torch.Generator().manual_seed(2)).float()
            one = torch.ones(())
            results.append(k.fake_quant_conv2d(outs[0].detach(), scale[0], weight, one, padding=1, backend="native"))
        else:
            mean, var = k.bn_stats(x, backend="native")
            stored = [parameters["running_mean"]], [parameters["running_var"]]
            outs = [k.bn_stat_loss([mean], [var], *stored, backend="native")]
        torch.stack([(out * out).sum() for out in outs]).sum().backward()
        results += [*(out.detach() for out in outs), x.grad]
    return results


LEVELS = """
import hashlib, torch
from dfq_kernels import extension
from dfq_kernels.dispatch import missing
from dfq_kernels.specs import all_specs
from tests.test_native import digest
print(extension.native().isa, digest())
"""


def digest() -> str:
    """Of every bit that every case of every operator gives."""
    total = hashlib.sha256()
    for spec in all_specs().values():
        for case in spec.cases:
            for name, value in sorted(run(spec, case, "native", "cpu").items()):
                total.update(name.encode() + value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    for size in (9, 24, 49):
        _, mask = fake_quant.forward(torch.linspace(-1, 1, size), torch.tensor(0.1), torch.tensor(0.0), -8, 7, None)
        total.update(mask.numpy().tobytes())
    return total.hexdigest()


@native_only
def test_every_instruction_set_level_gives_the_same_bits() -> None:
    here = extension.native().isa
    levels = ["baseline", "v2", "v3", "v4"]
    for level in levels[: levels.index(here)]:
        done = subprocess.run(
            [sys.executable, "-c", LEVELS], capture_output=True, text=True, env={**os.environ, "DFQ_CPU": level}
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == [level, digest()]


class Recorder(TorchDispatchMode):
    """Keeps a call of every operator of this library that is made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[Any, tuple[Any, ...]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "dfq_kernels":
            self.calls.setdefault(func, torch.utils._pytree.tree_map_only(Tensor, Tensor.clone, args))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_registered_operators_pass_opcheck(backend: str) -> None:
    if (reason := missing("fake_quant", backend, "cpu")) is not None:
        pytest.skip(reason)
    recorder = Recorder()
    with recorder:
        for op, spec in all_specs().items():
            if missing(op, backend, "cpu") is None:
                run(spec, next(case for case in spec.cases if case.gradients), backend, "cpu")
        x = torch.randn(3, 4, requires_grad=True)
        k.fake_quant(x, 0.1, 0, backend=backend).sum().backward()  # a mask instead of a learned scale
    # seven training operators and their backwards (the identity has none), five on integers; a convolution of integers
    # whose backward is torch's, native alone
    assert len(recorder.calls) == 13 + 5 + (backend == "native")
    weights = getattr(torch.ops.dfq_kernels, f"fake_quant_weights_{backend}").default
    calls = [*recorder.calls.items(), (weights, ([torch.randn(5, 7).t(), torch.randn(2, 3, 4)], [4, 4], torch.float16))]
    for func, args in calls:
        torch.library.opcheck(func, args, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"))


@pytest.mark.parametrize("backend", ["native", "triton", "reference"])
def test_what_a_call_does_not_update_is_left_alone(backend: str) -> None:
    """Frozen statistics and a learned range keep type, value and version; an expanded one will do."""
    if (reason := missing("fake_quant", backend, "cpu")) is not None:
        pytest.skip(reason)
    x, stored = torch.randn(4, 6, 3, 3), torch.full((6,), 0.1, dtype=torch.float64)
    expanded, scale = torch.ones(1).expand(6), torch.tensor(0.1, dtype=torch.float64)
    zero = torch.zeros(())
    versions = [tensor._version for tensor in (stored, expanded, scale)]
    k.bn_act_fake_quant(x, None, None, stored, expanded, zero, zero, scale, zero, observe=False, backend=backend)
    assert [tensor._version for tensor in (stored, expanded, scale)] == versions
    assert float(stored[0]) == 0.1 and float(scale) == 0.1


@native_only
def test_parameters_of_other_types_are_updated_too() -> None:
    x, ranges = torch.randn(4, 6), {name: value.double() for name, value in fresh_range().items()}
    expected = {name: value.clone() for name, value in ranges.items()}
    k.observe_fake_quant(x, **ranges, backend="native")
    k.observe_fake_quant(x, **expected, backend="reference")
    for name, value in ranges.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-6)
    assert ranges["running_max"] == x.max()


@native_only
def test_a_gradient_of_another_layout_meets_its_own_mask() -> None:
    x = torch.randn(2, 3, 5, 7).contiguous(memory_format=torch.channels_last).requires_grad_()
    grad = torch.randn(2, 3, 5, 7)
    k.fake_quant(x, 0.1, 0, -4, 3, backend="native").backward(grad)
    inside = (x.detach() / 0.1).round().abs() <= 3.5
    inside |= (x.detach() / 0.1).round() == -4
    assert torch.equal(x.grad, grad * inside)


@native_only
def test_not_a_number_in_one_channel_leaves_the_range_alone() -> None:
    for layout in ("contiguous", "channels_last"):
        x = layouts(torch.randn(2, 40, 9, 9))[layout]
        x[1, 3, 4, 4] = float("nan")
        found = {}
        for backend in ("native", "reference"):
            ranges = fresh_range(-1.0, 1.0, 0.5)
            k.bn_act_fake_quant(x, None, None, torch.zeros(40), torch.ones(40), **ranges, backend=backend)
            found[backend] = torch.stack(list(ranges.values()))
        assert torch.equal(found["native"], found["reference"])


def free_gigabytes() -> float:
    """Memory that this machine could give now."""
    path = Path("/proc/meminfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(line.split()[1]) / 2**20 for line in lines if line.startswith("MemAvailable")), 0.0)


@native_only
@pytest.mark.parametrize("activation", [None, "relu", "relu6"])
@pytest.mark.parametrize(
    ("quant_min", "quant_max", "zero_point"),
    [(0, 15, 0.0), (0, 15, 3.0), (0, 15, 15.0), (0, 15, 40.0), (-8, 7, -8.0), (-8, 7, 0.0), (-3, 2, -1.0)],
)
@pytest.mark.parametrize("scale", [0.25, 0.1, 0.7, 6.0, 1e-30, 1e30])
def test_values_at_every_bound_and_their_neighbours(
    activation: str | None, quant_min: int, quant_max: int, zero_point: float, scale: float
) -> None:
    """Batch norm is the identity, so x is what meets activation and clamp: ties, bounds, one float off, not numbers."""
    halves = (torch.arange(2 * quant_min - 4, 2 * quant_max + 6) / 2 - zero_point) * torch.tensor(scale)
    special = [0.0, -0.0, 6.0, 1e-45, -1e-45, float("inf"), float("-inf"), float("nan"), 3e38, -3e38]
    at = torch.cat([halves, torch.tensor(special)])
    beside = [torch.nextafter(at, torch.tensor(float(side))) for side in ("inf", "-inf")]
    x = torch.cat([at, *beside])[:, None].expand(-1, 2).contiguous()
    settings = {"eps": 1e-30, "activation": activation, "observe": False}
    found = {}
    for backend in ("native", "reference"):
        leaf = x.clone().requires_grad_()
        out = k.bn_act_fake_quant(
            leaf, None, None, torch.zeros(2), torch.ones(2), torch.tensor(0.0), torch.tensor(0.0), torch.tensor(scale),
            torch.tensor(zero_point), quant_min=quant_min, quant_max=quant_max, backend=backend, **settings,
        )  # fmt: skip
        (grad,) = torch.autograd.grad(out, leaf, torch.full_like(out, 3.0))
        found[backend] = out.detach(), grad
    for mine, reference in zip(*found.values(), strict=True):
        assert torch.equal(mine.nan_to_num(nan=-1e9), reference.nan_to_num(nan=-1e9))


@native_only
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm of the binutils")
def test_inner_loops_are_not_calls() -> None:
    """A step that the compiler leaves as a function takes its sums through memory, at half the speed."""
    command = ["nm", "--demangle", str(extension.native().__file__)]
    names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert any("dfq::baseline::" in name for name in names)
    assert [name for name in names if re.search(r"::operator\(\)\(long, float __vector\(\d+\) const\*", name)] == []


@native_only
def test_a_second_derivative_is_refused() -> None:
    x = torch.randn(3, 4, 5, 5, requires_grad=True)
    var = k.bn_stats(x, backend="native")[1]
    (grad,) = torch.autograd.grad(var, x, torch.ones_like(var, requires_grad=True), create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        grad.sum().backward()


@pytest.mark.long
@native_only
@pytest.mark.skipif(free_gigabytes() < 18, reason=f"needs 18 GiB of memory, there are {free_gigabytes():.0f}")
def test_more_than_2_to_the_31_elements() -> None:
    """Values at the ends and where 32 bits would wrap reach their places, forward, backward and in statistics."""
    per_channel = 715_827_883
    x = torch.zeros(3 * per_channel, dtype=torch.bfloat16)
    places = [0, 1, len(x) // 2, 2**31 - 1, 2**31]
    values = torch.tensor([0.5, -9.0, 3.0, 1.0, 7.0], dtype=torch.bfloat16)
    x[places] = values
    out = k.fake_quant(x.requires_grad_(), 0.25, 0, -8, 7, backend="native")
    assert torch.equal(out.detach()[places], k.fake_quant(values, 0.25, 0, -8, 7, backend="reference"))
    assert int(torch.count_nonzero(out.detach().view(torch.int16))) == len(places)
    total = out.sum()
    del out  # the gradient takes its memory: fresh pages are what takes longest here
    (grad,) = torch.autograd.grad(total, x)
    inside = [1.0, 0.0, 0.0, 1.0, 0.0]
    assert grad[places].tolist() == inside and int(torch.count_nonzero(grad)) == len(x) - inside.count(0.0)
    del grad
    mean, _ = k.bn_stats(x.detach().view(1, 3, per_channel), backend="native")
    expected = torch.tensor([0.5 - 9.0, 3.0, 1.0 + 7.0]) / per_channel
    torch.testing.assert_close(mean, expected, rtol=1e-5, atol=0)
