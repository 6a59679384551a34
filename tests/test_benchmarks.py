"""pytest-benchmark over the rows of the kernel benchmark, and what the benchmark refuses.

In `make test` every row runs once; `pytest tests/test_benchmarks.py --benchmark-enable` measures.
"""

from __future__ import annotations

import json
import math
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import end_to_end, run
from benchmarks.baselines import rows
from benchmarks.machine import commit_of, write_results
from benchmarks.predicted import Counting
from benchmarks.timing import Seconds
from benchmarks.torch_ao import HookStatistics, TorchAo
from dfq.quant.quantizers import ActivationQuantizer
from dfq_kernels.dispatch import missing
from dfq_kernels.specs import all_specs

CPU = torch.device("cpu")
ROWS = {f"{row.op} {row.name}".strip(): row for row in rows(CPU)}
X = torch.randn(128, 32, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("layout", run.LAYOUTS)
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("who", ["native", "torch"])
@pytest.mark.parametrize("name", ROWS)
def test_speed(benchmark, name: str, who: str, direction: str, layout: str) -> None:
    row, x = run.fresh(ROWS[name], CPU), X.contiguous(memory_format=run.LAYOUTS[layout])
    if who == "native" and (reason := missing(row.op, who, "cpu")):
        pytest.skip(reason)
    call = row.theirs if who == "torch" else lambda t: row.ours(t, "native")
    benchmark.group = f"{name} {direction} {layout}"
    benchmark(run.backward_of(call, x) if direction == "backward" else lambda: call(x))


def test_every_operator_on_activations_is_a_row() -> None:
    elsewhere = {"fake_quant_weights", "bn_stat_loss"}  # all layers of a network in one call
    elsewhere.add("fake_quant_conv2d")  # the layers of benchmarks/layers.py
    elsewhere |= {op for op, spec in all_specs().items() if not spec.differentiable}  # benchmarks/integer.py
    assert {row.op for row in ROWS.values()} == set(all_specs()) - elsewhere


@pytest.mark.skipif(missing("fake_quant", "native", "cpu") is not None, reason="no native kernels")
def test_a_kernel_that_is_not_the_reference_gets_no_number(monkeypatch) -> None:
    row = ROWS["fake_quant per tensor"]
    assert run.conforms(row, X, "native")
    wrong = replace(row, ours=lambda x, backend: row.ours(x, backend) + (0.05 if backend == "native" else 0))
    monkeypatch.setattr(run, "fresh", lambda *_: wrong)
    with pytest.raises(SystemExit, match="fake_quant native must equal the reference before it is measured"):
        run.measure(wrong, X, 0.01, compiled=False)


@pytest.mark.skipif(missing("fake_quant", "native", "cpu") is not None, reason="no native kernels")
def test_a_rate_beyond_the_traffic_fails(monkeypatch) -> None:
    times = {name: Seconds(1.0, 1.0) for name in ("torch", "copy", "read")}
    monkeypatch.setattr(run, "timed", lambda *_: (times | {"native": Seconds(0.9, 0.9)}, []))
    with pytest.raises(SystemExit, match="fake_quant forward must take at least the 1000000 us of its traffic"):
        run.measure(ROWS["fake_quant per tensor"], X, 0.01, compiled=False)


def test_results_name_their_machine(tmp_path: Path) -> None:
    write_results(tmp_path / "a.json", [{"op": "x", "us": 1.0}, {"op": "y", "us": 2.0}])
    data = json.loads((tmp_path / "a.json").read_text())
    assert data["rows"][1] == {"op": "y", "us": 2.0}
    assert {"cpu", "threads", "gpu", "torch", "commit"} <= set(data["machine"])


@pytest.mark.parametrize("ranges", ["minmax", "lsq"])
def test_torch_ao_s_step_does_the_same(ranges: str) -> None:
    """Same images, same statistics, same activations; torch.ao rounds the scales of symmetric weights its own way."""
    work = end_to_end.Workload(precision="fp32", ranges=ranges, batch=8)
    ours, theirs = (end_to_end.calibrated(work) for _ in range(2))
    hooks, operators = HookStatistics(theirs.teacher), TorchAo()
    images = ours.pool.batch("test", 0)
    with ours.bn_statistics as mine, hooks as others:
        logits = ours.fused_teacher(images), theirs.teacher(images)
        torch.testing.assert_close(mine.loss(), others.loss(), rtol=1e-5, atol=0)
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
    quantizer = next(module for module in ours.students[0].modules() if isinstance(module, ActivationQuantizer))
    quantizer.source, quantizer.adapting = "moving", True
    with operators.in_place_of_ours():
        their_values, _ = quantizer(images)
    our_values, scale = quantizer(images)
    assert float((our_values - their_values).abs().max()) < 1e-3 * float(scale)
    steps = end_to_end.variants(work, CPU, compiled=False)
    assert set(steps) == {"dfq-kernels", "torch.ao"}
    for step in steps.values():
        assert math.isfinite(step()["student0/distillation"])


@pytest.mark.skipif(missing("fake_quant", "native", "cpu") is not None, reason="no native kernels")
@pytest.mark.parametrize("layout", run.LAYOUTS)
@pytest.mark.parametrize("name", ROWS)
def test_predicted_bytes_are_those_of_the_specs(name: str, layout: str) -> None:
    """But for the numbers of channels, which the specs leave out."""
    row = run.fresh(ROWS[name], CPU)
    x = torch.randn(8, 16, 32, 32).contiguous(memory_format=run.LAYOUTS[layout]).requires_grad_()
    forward, backward = all_specs()[row.op].bytes_moved({"x": x}, dict(row.settings))
    with Counting() as counted:
        outs = row.ours(x, "native")
    assert counted.bytes_moved == pytest.approx(forward, rel=0.02)
    outs = [out for out in (outs if isinstance(outs, tuple) else (outs,)) if out.requires_grad]
    grads = [torch.ones_like(out) for out in outs]
    with Counting() as counted:
        torch.autograd.grad(outs, x, grads)
    assert counted.bytes_moved == pytest.approx(backward, rel=0.02)


def test_a_prediction_grows_with_the_batch_and_not_in_launches() -> None:
    work = end_to_end.Workload(batch=2)
    few, real = end_to_end.prediction(work), end_to_end.prediction(replace(work, batch=64))
    assert few["launches"] == real["launches"] > 400
    assert few["launches"] < 670  # counted: 652; a cast or a copy for every layer is 17 or more
    step = end_to_end.variants(replace(work, batch=64), CPU, compiled=False)["dfq-kernels"]
    with end_to_end.as_a_gpu_runs_it():
        step()
        with Counting() as counted:
            step()
    assert counted.bytes_moved == pytest.approx(1e9 * real["gigabytes"], rel=1e-3)
    assert counted.launches == real["launches"]


def test_results_of_the_benchmark_before_make_no_commit_dirty(tmp_path: Path) -> None:
    """`make bench` writes four files."""
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    code, result = tmp_path / "benchmarks" / "run.py", tmp_path / "benchmarks" / "results" / "kernels.json"
    code.write_text("1"), result.write_text("1")
    for command in ("init -q", "add -A", "-c user.name=a -c user.email=a@b commit -qm a"):
        subprocess.run(["git", *command.split()], cwd=tmp_path, check=True)
    name = commit_of(code.parent)
    assert name and not name.endswith("-dirty")
    result.write_text("2")
    assert commit_of(code.parent) == name
    code.write_text("2")
    assert commit_of(code.parent) == f"{name}-dirty"
