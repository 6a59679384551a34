"""Which backend runs, and what is said of those that do not."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch

import dfq_kernels as k
from dfq_kernels import dispatch, extension
from dfq_kernels.dispatch import BACKENDS, TABLE, missing, resolve
from dfq_kernels.specs import OpSpec, all_specs


def test_the_automatic_choice_is_the_first_that_is_there() -> None:
    for op, devices in TABLE.items():
        present = [name for name in devices["cpu"] if missing(op, name, "cpu") is None]
        assert present and resolve(op, None, torch.ones(1)).__name__ == f"dfq_kernels.{op}.{present[0]}"


def test_an_explicit_backend_never_falls_back() -> None:
    for backend in (*BACKENDS, "cuda-graphs"):
        reason = missing("fake_quant", backend, "cpu")
        if reason is not None:
            with pytest.raises(k.BackendError, match=f"fake_quant: backend must be .* got '{backend}'"):
                k.fake_quant(torch.zeros(1), 1.0, 0, backend=backend)
    with pytest.raises(k.BackendError, match="no such backend"):
        k.bn_stats(torch.ones(2, 2), backend="nonsense")


def test_the_environment_overrides_the_automatic_choice_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dfq_kernels.dispatch._FOR_ALL", "nonsense")
    with pytest.raises(k.BackendError, match="nonsense"):
        k.fake_quant(torch.zeros(1), 1.0, 0)
    k.fake_quant(torch.zeros(1), 1.0, 0, backend="reference")


def test_an_operator_without_the_environment_s_backend_takes_its_best(monkeypatch: pytest.MonkeyPatch) -> None:
    """A student trains on Triton, although its convolutions have no kernel there; asked for by name, they say so."""
    monkeypatch.setattr("dfq_kernels.dispatch._FOR_ALL", "triton")
    x, one = torch.ones(2, 3, 16, 16), torch.ones(())
    assert k.fake_quant_conv2d(x, one, torch.ones(4, 3, 1, 1), one).unique().tolist() == [3.0]
    with pytest.raises(k.BackendError, match="there is no triton kernel for device type cpu"):
        k.fake_quant_conv2d(x, one, torch.ones(4, 3, 1, 1), one, backend="triton")


def test_the_reference_runs_everywhere_that_torch_does() -> None:
    assert all(missing(op, "reference", "cpu") is None for op in TABLE)
    if not torch.cuda.is_available():
        assert missing("fake_quant", "reference", "cuda") == "torch sees no CUDA device"


def test_float64_runs_in_the_reference_alone() -> None:
    x = torch.linspace(-1, 1, 9, dtype=torch.float64)
    assert k.fake_quant(x, 0.25, 0).dtype == torch.float64
    assert resolve("fake_quant", None, x).__name__ == "dfq_kernels.fake_quant.reference"
    if missing("fake_quant", "native", "cpu") is None:
        with pytest.raises(k.BackendError, match="it runs float32, bfloat16 and float16, not float64"):
            k.fake_quant(x, 0.25, 0, backend="native")


def test_the_support_matrix_gives_a_reason_for_every_hole() -> None:
    text = subprocess.run([sys.executable, "-m", "dfq_kernels"], capture_output=True, text=True, check=True).stdout
    rows = text.splitlines()[2:]
    assert len(rows) == sum(len(backends) for devices in TABLE.values() for backends in devices.values())
    for row in rows:
        assert row.rstrip().endswith("yes") or "no: " in row or "leaves" in row
    assert [row.split()[:3] for row in rows if "leaves" in row] in ([], [["fake_quant_conv2d", "cpu", "native"]])
    assert text.splitlines()[0] == extension.built()
    assert sum(" * " in row for row in rows if " cpu " in row) == len(TABLE)


@pytest.mark.parametrize(
    ("reason", "warns"),
    [("the native module was not built: no C++ compiler was found", True),
     ("the native module was not built: it was built with DFQ_BUILD_NATIVE=0", False)],
)  # fmt: skip
def test_a_fallback_that_nobody_asked_for_warns(monkeypatch: pytest.MonkeyPatch, reason: str, warns: bool) -> None:
    monkeypatch.setattr(dispatch.extension, "missing", lambda device: reason)
    monkeypatch.setattr(dispatch, "missing", lambda op, name, *rest: None if name == "reference" else reason)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert dispatch._choose.__wrapped__("bn_stats", "auto", "cpu", torch.float32) == "reference"
    assert [str(item.message) for item in said] == ([f"bn_stats runs as reference on cpu: {reason}"] if warns else [])


ONE, CUBE = torch.ones(()), torch.ones(2, 1, 1, 1)
WRONG_CALLS = {
    "fake_quant: x must be a torch.Tensor": lambda x: k.fake_quant([1.0], 1.0, 0),
    "fake_quant: x must be float32": lambda x: k.fake_quant(x.long(), 1.0, 0),
    r"fake_quant: scale must be finite and at least 2\^-126, got 0": lambda x: k.fake_quant(x, 0.0, 0),
    r"fake_quant: scale must be finite and at least 2\^-126, got nan": lambda x: k.fake_quant(x, float("nan"), 0),
    "fake_quant: quant_max must be greater than quant_min 3, got 3": lambda x: k.fake_quant(x, 1.0, 0, 3, 3),
    "fake_quant: quant_min must be an integer": lambda x: k.fake_quant(x, 1.0, 0, -0.5, 3),
    "fake_quant: axis must be None or in": lambda x: k.fake_quant(x, torch.ones(4), 0.0, axis=7),
    "fake_quant: scale must have shape": lambda x: k.fake_quant(x, torch.ones(5), 0.0, axis=1),
    "fake_quant: scale must have one element": lambda x: k.fake_quant(x, torch.ones(5), 0.0),
    "fake_quant: scale must be on cpu": lambda x: k.fake_quant(x, torch.ones((), device="meta"), 0.0),
    "observe_fake_quant: running_min must be a tensor of one": lambda x: k.observe_fake_quant(x, x, x, x, x),
    "observe_fake_quant: x must have at least one element": lambda x: k.observe_fake_quant(x[:0], x, x, x, x),
    "fake_quant_weights: weights must hold at least one": lambda x: k.fake_quant_weights([], 4),
    "fake_quant_weights: bits must be in": lambda x: k.fake_quant_weights([x], 9),
    "fake_quant_weights: bits must be one number or 1": lambda x: k.fake_quant_weights([x], [4, 4]),
    "bn_stats: x must be .N, C": lambda x: k.bn_stats(x[0, 0]),
    "bn_stats: x must have at least one value": lambda x: k.bn_stats(x[:0]),
    "bn_act_stats: running_mean must have shape": lambda x: k.bn_act_stats(x, None, None, torch.ones(9), torch.ones(9)),
    "bn_act_stats: activation must be": lambda x: k.bn_act_stats(
        x, None, None, torch.ones(3), torch.ones(3), activation="gelu"
    ),
    "bn_act_stats: weight must not require a gradient": lambda x: k.bn_act_stats(
        x, torch.ones(3, requires_grad=True), None, torch.ones(3), torch.ones(3)
    ),
    "bn_act_stats: eps must be": lambda x: k.bn_act_stats(x, None, None, torch.ones(3), torch.ones(3), eps=0.0),
    "bn_stat_loss: variances must hold 1 layers": lambda x: k.bn_stat_loss([x[0]], [], [x[0]], [x[0]]),
    "bn_stat_loss: means must hold at least one": lambda x: k.bn_stat_loss([], [], [], []),
    "fake_quant_conv2d: x must be .N, C, H, W. of": lambda x: k.fake_quant_conv2d(x, ONE, CUBE, ONE),
    "fake_quant_conv2d: weight must be .O, C / groups": lambda x: k.fake_quant_conv2d(x[None], ONE, x, ONE),
    "fake_quant_conv2d: weight must be within": lambda x: k.fake_quant_conv2d(
        x[None], ONE, torch.ones(4, 2, 5, 5), ONE
    ),
    "fake_quant_conv2d: groups must be a divisor of 2 and 2": lambda x: k.fake_quant_conv2d(x[None], ONE, CUBE, ONE),
    "fake_quant_conv2d: x_scale must be a tensor of one": lambda x: k.fake_quant_conv2d(x[None], 0.1, CUBE, ONE),
    "fake_quant_conv2d: weight_scale must be a torch.Tensor": lambda x: k.fake_quant_conv2d(x[None], ONE, CUBE, 0.1),
    "fake_quant_conv2d: weight_scale must be a torch.Tensor, got None": lambda x: k.fake_quant_conv2d(
        x[None], ONE, CUBE, None
    ),
    "fake_quant_conv2d: weight_scale must be one number": lambda x: k.fake_quant_conv2d(
        x[None], ONE, CUBE, torch.ones(1, 1, 1, 1)
    ),
    "fake_quant_conv2d: weight_scale must be one number or of shape": lambda x: k.fake_quant_conv2d(
        x[None], ONE, CUBE, torch.ones(5)
    ),
    "fake_quant_conv2d: bias must be of shape": lambda x: k.fake_quant_conv2d(x[None], ONE, CUBE, ONE, torch.ones(5)),
    "fake_quant_conv2d: dtype must be float32": lambda x: k.fake_quant_conv2d(
        x[None], ONE, torch.ones(4, 2, 1, 1), ONE, dtype=torch.int8
    ),
    "bn_stat_loss: means.0. must have shape": lambda x: k.bn_stat_loss([x], [x], [x], [x]),
}


@pytest.mark.parametrize("text", WRONG_CALLS)
def test_wrong_calls_name_argument_rule_and_value(text: str) -> None:
    with pytest.raises(ValueError, match=text) as error:
        WRONG_CALLS[text](torch.ones(2, 3, 4))
    assert "\n" not in str(error.value) and "got " in str(error.value)


def test_bn_act_fake_quant_refuses_a_learned_scale_that_is_observed() -> None:
    one = torch.ones(())
    with pytest.raises(ValueError, match="observe must be False for a scale that requires a gradient"):
        k.bn_act_fake_quant(
            torch.ones(2, 3), None, None, torch.zeros(3), torch.ones(3), one, one, one.clone().requires_grad_(), one
        )


def test_what_is_written_to_is_no_part_of_a_graph() -> None:
    x = torch.ones(2, 3)
    state = {name: torch.ones(()) for name in ("running_min", "running_max", "scale", "zero_point")}
    for name in state:
        learned = {**state, name: torch.ones((), requires_grad=True)}
        with pytest.raises(ValueError, match=f"observe_fake_quant: {name} must not require a gradient"):
            k.observe_fake_quant(x, **learned)
    stored = {name: torch.ones(3) for name in ("weight", "bias", "running_mean", "running_var")}
    for name in ("running_mean", "running_var"):
        learned = {**stored, name: torch.ones(3, requires_grad=True)}
        with pytest.raises(ValueError, match=f"bn_act_fake_quant: {name} must not require a gradient"):
            k.bn_act_fake_quant(x, **learned, **state, training=True)
    with pytest.raises(ValueError, match="bn_act_fake_quant: running_max must not require a gradient"):
        k.bn_act_fake_quant(x, **stored, **{**state, "running_max": torch.ones((), requires_grad=True)}, observe=True)


@pytest.mark.parametrize("scale", [0.0, -1.0, 2.0**-127, float("inf"), float("nan")])
def test_a_scale_without_a_finite_reciprocal_is_refused(scale: float) -> None:
    with pytest.raises(ValueError, match=r"fake_quant: scale must be finite and at least 2\^-126, got"):
        k.fake_quant(torch.ones(1), scale, 0)
    assert k.fake_quant(torch.ones(1), 2.0**-126, 0).isfinite()


@pytest.mark.parametrize("spec", all_specs().values(), ids=lambda spec: spec.op)
def test_a_freed_or_shrunk_storage_is_refused(spec: OpSpec) -> None:
    """Every tensor of every operator, where torch's own operators crash the process."""
    case = next(case for case in spec.cases if case.gradients)
    tensors, _ = case.make(torch.Generator().manual_seed(0))
    for name in tensors:
        for left in (0, 2):
            tensors, keywords = case.make(torch.Generator().manual_seed(0))
            victim = tensors[name][0] if isinstance(tensors[name], (list, tuple)) else tensors[name]
            if not isinstance(victim, torch.Tensor):
                continue
            victim.untyped_storage().resize_(left)
            names = {"fake_quant_weights": "weights", "bn_stat_loss": r"\w+"}  # lists, given one by one
            rule = rf"{spec.op}: {names.get(spec.op, name)}.* must have a storage of \d+ bytes, got one of {left}"
            with pytest.raises(ValueError, match=rule):
                spec.call(**tensors, **keywords)


def test_a_view_behind_the_end_of_its_storage_is_refused() -> None:
    base = torch.randn(100)
    views = {"x": base[60:], "every second": base[::2], "expanded": base[90:91].expand(50)}
    for x in views.values():
        k.fake_quant(x, 0.1, 0)
    base.untyped_storage().resize_(4 * 70)
    for x in views.values():
        with pytest.raises(ValueError, match="fake_quant: x must have a storage of"):
            k.fake_quant(x, 0.1, 0)


def test_a_sparse_tensor_is_refused() -> None:
    with pytest.raises(ValueError, match=r"bn_stats: x must be a dense tensor, got torch.sparse_coo"):
        k.bn_stats(torch.eye(3).to_sparse())
