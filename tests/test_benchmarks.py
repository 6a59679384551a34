"""pytest-benchmark over the rows of the kernel benchmark, and what the benchmark refuses.

In `make test` every row runs once; `pytest tests/test_benchmarks.py --benchmark-enable` measures.
"""

from __future__ import annotations

import json
import math
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from benchmarks import end_to_end, run
from benchmarks.baselines import rows
from benchmarks.machine import UNKNOWN, commit_of, write_results
from benchmarks.outcome import finish
from benchmarks.predicted import Counting
from benchmarks.rows import found_rows, with_commits
from benchmarks.timing import Seconds, per_graph
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
    (row,) = run.measure(wrong, X, 0.01, compiled=False)
    assert row["red"] == "fake_quant native must equal the reference before it is measured" and "us" not in row


@pytest.mark.skipif(missing("fake_quant", "native", "cpu") is not None, reason="no native kernels")
def test_a_rate_beyond_the_traffic_is_red_and_the_run_goes_on(monkeypatch) -> None:
    times = {name: Seconds(1.0, 1.0) for name in ("torch", "copy", "read")}
    found = iter([Seconds(0.9, 0.9), Seconds(1.1, 1.1)])
    monkeypatch.setattr(run, "timed", lambda *_: (times | {"native": next(found)}, []))
    forward, backward = run.measure(ROWS["fake_quant per tensor"], X, 0.01, compiled=False)
    assert forward["red"] == "fake_quant forward must take at least 950000.0 us for its traffic, got 900000.0"
    assert "us" not in forward and "red" not in backward and backward["us"] == 1.1e6


def test_the_ceilings_of_memory_and_of_a_cache() -> None:
    """In memory every byte costs what it costs a copy or a sum; in a GPU's L2 a kernel may be faster than a sum."""
    assert run.least_seconds(1, 1, 2.0, 1.5, cached=False) == pytest.approx(0.95 * 2.0)
    assert run.least_seconds(2, 1, 4.0, 1.0, cached=False) == pytest.approx(0.95 * 3.0)
    assert run.least_seconds(1, 0, 2.0, 1.5, cached=False) == pytest.approx(0.95 * 1.5)
    assert run.least_seconds(1, 0, 2.0, 1.5, cached=True) == 0.5  # faster than the sum, not than half a copy
    assert run.least_seconds(2, 1, 2.0, 1.5, cached=True) == 1.0
    assert not run.in_cache(X)


def test_a_run_with_a_red_row_is_written_and_ends_with_1(tmp_path: Path) -> None:
    rows = [{"op": "x", "us": 1.0}, {"op": "y", "red": "y must be faster"}]
    with pytest.raises(SystemExit, match="1 of 2 rows are red:\n.*y must be faster") as ended:
        finish(tmp_path / "a.json", rows)
    assert ended.value.code and json.loads((tmp_path / "a.json").read_text())["rows"] == rows
    finish(tmp_path / "b.json", rows[:1])


def test_a_step_that_fails_is_a_row_and_the_others_are_measured() -> None:
    def failing() -> None:
        raise RuntimeError("cannot be captured\nand more")

    steps = {"dfq-kernels": lambda: None, "dfq-kernels captured": failing, "torch.ao compiled": failing}
    mine, captured_, theirs = end_to_end.measured(end_to_end.Workload(), steps, CPU, 0.0)
    assert mine["steps_per_second"] > 0 and mine["times_eager"] == 1
    assert captured_["red"] == theirs["failed"] == "cannot be captured" and "red" not in theirs


def test_small_kernels_are_captured_often_enough() -> None:
    assert per_graph(2**20) >= 50 and 1 < per_graph(2**30) < per_graph(2**20)


@pytest.mark.parametrize("path", ["", "folder"])
def test_without_git_the_commit_is_unknown_and_it_says_so(path: str, tmp_path: Path, monkeypatch, capsys) -> None:
    """Neither a program nor a repository."""
    if not path:
        monkeypatch.setenv("PATH", str(tmp_path))
    else:
        monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert commit_of(tmp_path) == UNKNOWN == "unknown"
    assert "the commit of these numbers is unknown: " in capsys.readouterr().err


def test_results_name_their_machine(tmp_path: Path) -> None:
    write_results(tmp_path / "a.json", [{"op": "x", "us": 1.0}, {"op": "y", "us": 2.0}])
    data = json.loads((tmp_path / "a.json").read_text())
    assert data["rows"][1] == {"op": "y", "us": 2.0}
    assert {"cpu", "threads", "gpu", "torch", "commit", "date"} <= set(data["machine"])


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


@dataclass(frozen=True)
class Training:
    path: Path
    students: tuple[str, ...]
    name: str = ""


def test_rows_of_before_stay_until_they_are_measured_again(tmp_path: Path) -> None:
    lately, earlier, nowhere = (Training(tmp_path / f"{name}.json", (name,)) for name in ("a", "b", "c"))
    lately.path.write_text('{"students": ["a"], "accuracy": 2, "machine": {"commit": "new", "date": "today"}}')
    before = [{"students": [name], "accuracy": 1, "commit": "old", "date": "then"} for name in ("a", "b", "other")]
    found = found_rows([nowhere, lately, earlier], before, ("students",))
    with_commits(found)
    assert found == [{"students": ["a"], "accuracy": 2, "commit": "new", "date": "today"}, before[1]]
