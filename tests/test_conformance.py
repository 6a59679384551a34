"""Every operator x backend x case against the reference, and what every backend must keep."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dfq_kernels.dispatch import BACKENDS, missing
from dfq_kernels.specs import Case, OpSpec, all_specs
from tests.conftest import SEED
from tests.views import moved

pytestmark = pytest.mark.usefixtures("poison")
DEVICES = ("cpu", "cuda")
SPECS = all_specs()


def parameters() -> list[Any]:
    rows = []
    for op, spec in SPECS.items():
        for device in DEVICES:
            for backend in BACKENDS:
                reason = missing(op, backend, device)
                marks = [pytest.mark.gpu] if device == "cuda" else []
                if reason is not None:
                    marks.append(pytest.mark.skip(reason=f"{op} {backend} {device}: {reason}"))
                    rows.append(
                        pytest.param(spec, spec.cases[0], backend, device, marks=marks, id=f"{op}-{backend}-{device}")
                    )
                    continue
                rows += [
                    pytest.param(spec, case, backend, device, marks=marks, id=f"{op}-{case.name}-{backend}-{device}")
                    for case in spec.cases
                ]
    return rows


every_case = pytest.mark.parametrize(("spec", "case", "backend", "device"), parameters())


def storage(tensor: Tensor) -> Tensor:
    """A copy of every byte of the memory that the tensor is a view of: around it, between its elements, NaNs too."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage()).clone()


def run(
    spec: OpSpec, case: Case, backend: str, device: str, *, call: Any = None, contiguous: bool = False
) -> dict[str, Tensor]:
    """Outputs, updated tensors and gradients of one fresh call, by name; it must leave its inputs alone."""
    tensors, keywords = case.make(torch.Generator().manual_seed(SEED))
    for name, value in tensors.items():
        if isinstance(value, Tensor):
            value = moved(value, device)
            value = value.contiguous() if contiguous else value
            learned = name != "scale" or keywords.get("observe") is False or spec.op == "fake_quant"
            tensors[name] = value.requires_grad_(name in spec.differentiable and case.gradients and learned)
    before = {name: storage(value) for name, value in tensors.items() if isinstance(value, Tensor)}
    outs = (call or spec.call)(**tensors, **keywords, backend=backend)
    outs = outs if isinstance(outs, (tuple, list)) else (outs,)
    results = {f"out{index}": out.detach().clone() for index, out in enumerate(outs)}
    results |= {name: tensors[name].detach().clone() for name in spec.mutated}
    wanted = {name: value for name, value in tensors.items() if isinstance(value, Tensor) and value.requires_grad}
    if wanted:
        weights = torch.Generator().manual_seed(SEED + 1)
        pairs = [(out, torch.randn(out.shape, generator=weights).to(out)) for out in outs if out.requires_grad]
        grads = torch.autograd.grad([out for out, _ in pairs], list(wanted.values()), [grad for _, grad in pairs])
        results |= {f"grad_{name}": grad for name, grad in zip(wanted, grads, strict=True)}
    changed = [name for name, memory in before.items() if not torch.equal(storage(tensors[name]), memory)]
    assert set(changed) <= set(spec.mutated), f"{spec.op} {case.name} {backend}: {changed} must be left alone"
    return results


@cache
def run_before(op: str, case: str, backend: str, device: str) -> dict[str, Tensor]:
    """`run`, once for all tests that compare with it."""
    spec = SPECS[op]
    return run(spec, next(item for item in spec.cases if item.name == case), backend, device)


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            found[name], expected[name], rtol=0, atol=0, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}"
        )


def assert_close(spec: OpSpec, found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Bit-equal values where the spec is exact; sums (gradients of parameters, statistics) within its bound."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        exact = spec.exact and not name.startswith(("grad_scale", "grad_zero_point"))
        rtol, atol = (0.0, 0.0) if exact else (max(spec.rtol, 1e-5), max(spec.atol, 1e-5))
        if value.dtype in (torch.bfloat16, torch.float16) and not exact:
            rtol = 2 * torch.finfo(value.dtype).eps
        torch.testing.assert_close(found[name].cpu(), value, rtol=rtol, atol=atol, equal_nan=True)


@every_case
def test_equals_reference(spec: OpSpec, case: Case, backend: str, device: str) -> None:
    """Values, in-place updates and gradients; the reference itself is run on contiguous copies of the inputs."""
    expected = run(spec, case, "reference", "cpu", contiguous=True)
    assert_close(spec, run_before(spec.op, case.name, backend, device), expected)


@every_case
def test_same_bits_when_repeated(spec: OpSpec, case: Case, backend: str, device: str) -> None:
    assert_equal(run(spec, case, backend, device), run_before(spec.op, case.name, backend, device))


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu), "cpu"])
@pytest.mark.parametrize("backend", ["native", "triton"])
def test_every_byte_of_a_mask_is_written(backend: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever compares, hashes or saves what a forward keeps must find the same bits each time: none behind the end."""
    if (reason := missing("fake_quant", backend, device)) is not None:
        pytest.skip(reason)
    kept, reference = (import_module(f"dfq_kernels.fake_quant.{name}") for name in (backend, "reference"))
    for size in (1, 8, 9, 16, 17, 24, 49, 2056):
        for axis, channels in ((None, ()), (0, (size,))):
            x = torch.linspace(-1, 1, size, device=device)
            scale, zero_point = torch.full(channels, 0.1, device=device), torch.zeros(channels, device=device)
            inside = reference.forward(x, scale, zero_point, -8, 7, axis)[1].cpu()
            whole = torch.nn.functional.pad(inside, (0, -size % 16)).reshape(-1, 8).int()
            expected = (whole << torch.arange(8)).sum(1).to(torch.uint8)
            for value in (0, 255):  # what was in the memory
                like = partial(torch.full, (len(expected),), value, dtype=torch.uint8, device=device)
                monkeypatch.setattr(kept, "mask_like", lambda _, like=like: like())
                mask = kept.forward(x, scale, zero_point, -8, 7, axis)[1].cpu()
                assert torch.equal(mask, expected), (size, axis, value)


@every_case
def test_output_type_and_layout(spec: OpSpec, case: Case, backend: str, device: str) -> None:
    tensors, keywords = case.make(torch.Generator().manual_seed(SEED))
    if "x" not in tensors or not spec.differentiable or spec.op == "bn_stats":
        return
    out = run_before(spec.op, case.name, backend, device)["out0"]
    assert out.dtype == (keywords.get("dtype") or tensors["x"].dtype)
    assert out.shape == tensors["x"].shape or spec.op == "fake_quant_conv2d"
    if case.name == "channels_last":
        assert out.is_contiguous(memory_format=torch.channels_last)


def cases_run_again(spec: OpSpec, backend: str) -> list[Case]:
    """All cases; of Triton, which is interpreted, one of every set of types that tensors come in."""
    if backend != "triton":
        return list(spec.cases)
    cases = {str([getattr(value, "dtype", None) for value in case.make(torch.Generator())[0].values()]): case
             for case in spec.cases}  # fmt: skip
    return list(cases.values())


ON_CPU = [
    pytest.param(op, backend, marks=[pytest.mark.skip(reason=reason)] if reason else [], id=f"{op}-{backend}")
    for op in SPECS
    for backend in BACKENDS
    for reason in [missing(op, backend, "cpu")]
]


@pytest.mark.parametrize(("op", "backend"), ON_CPU)
def test_compiles_whole(op: str, backend: str) -> None:
    """`torch.compile(fullgraph=True)` traces the operator and gives the same values and gradients."""
    spec = SPECS[op]
    torch.compiler.reset()
    compiled = torch.compile(spec.call, fullgraph=True, backend="aot_eager")
    case = next(case for case in spec.cases if case.gradients)
    assert_close(spec, run(spec, case, backend, "cpu", call=compiled), run(spec, case, backend, "cpu"))


@pytest.mark.parametrize(("op", "backend"), ON_CPU)
def test_inside_a_checkpoint(op: str, backend: str) -> None:
    """Activation checkpointing runs the forward again, on a first batch whose range does not move twice."""
    spec = SPECS[op]
    case = next(case for case in spec.cases if case.gradients)

    def call(**arguments: Any) -> Any:
        return checkpoint(spec.call, use_reentrant=False, **arguments)

    assert_equal(run(spec, case, backend, "cpu", call=call), run_before(op, case.name, backend, "cpu"))


@pytest.mark.parametrize(("op", "backend"), ON_CPU)
def test_without_gradients(op: str, backend: str) -> None:
    """A call that nobody records, which takes another way, gives the same values and leaves its inputs alone, too."""
    spec = SPECS[op]
    for case in cases_run_again(spec, backend):
        found = run(spec, replace(case, gradients=False), backend, "cpu")
        before = run_before(op, case.name, backend, "cpu")
        assert_equal(found, {name: value for name, value in before.items() if not name.startswith("grad_")})


@pytest.mark.parametrize(("op", "backend"), ON_CPU)
def test_inside_autocast(op: str, backend: str) -> None:
    """Autocast changes nothing: the arithmetic is fp32 whatever the storage type."""
    spec = SPECS[op]
    for case in cases_run_again(spec, backend):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = run(spec, case, backend, "cpu")
        assert_equal(inside, run_before(op, case.name, backend, "cpu"))


# bytes per fp32 element, forward and backward: one read of what is read, one write of what is written, one bit where
# only a mask is saved; vectors of one number per channel or tensor are not counted
IDEAL_TRAFFIC = {
    ("fake_quant", "channels_last"): (8.125, 8.125),
    ("observe_fake_quant", "later_batch"): (12.125, 8.125),
    ("fake_quant_weights", "mixed_bits"): (8, 0),
    ("bn_stats", "channels_last"): (4, 8),
    ("bn_act_stats", "channels_last"): (8, 12),
    ("bn_act_fake_quant", "training"): (12, 20),
    ("bn_act_fake_quant", "frozen"): (12.125, 12),
    ("bn_act_fake_quant", "frozen_learned"): (8.125, 12),
}


@pytest.mark.parametrize(("op", "name"), IDEAL_TRAFFIC)
def test_traffic_is_the_ideal(op: str, name: str) -> None:
    case = next(case for case in SPECS[op].cases if case.name == name)
    tensors, keywords = case.make(torch.Generator().manual_seed(SEED))
    values = [tensors["x"]] if "x" in tensors else list(tensors.values())
    elements = sum(value.numel() for value in values)
    forward, backward = SPECS[op].bytes_moved(tensors, keywords)
    assert (forward / elements, backward / elements) == pytest.approx(IDEAL_TRAFFIC[op, name], rel=1e-3)


def test_a_learned_scale_reads_x_again() -> None:
    case = next(case for case in SPECS["fake_quant"].cases if case.name == "fp32_u4")
    tensors, keywords = case.make(torch.Generator().manual_seed(SEED))
    tensors["scale"].requires_grad_()
    forward, backward = SPECS["fake_quant"].bytes_moved(tensors, keywords)
    assert (forward / tensors["x"].numel(), backward / tensors["x"].numel()) == (8, 12)


def test_case_names_are_unique() -> None:
    for spec in SPECS.values():
        names = [case.name for case in spec.cases]
        assert len(names) == len(set(names)) and len(names) >= 4
