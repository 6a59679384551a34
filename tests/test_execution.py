"""Steps that are recorded and replayed: the same bits as steps that run, on the CPU by a stand-in for CUDA graphs."""

from __future__ import annotations

import copy
import json
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from dfq.config import quant_config
from dfq.method.objective import classifier
from dfq.method.trainer import DataFreeTraining
from dfq.models import ModelSpec, build_model
from dfq.running.execution import WARM_UP, Execution, ExecutionError
from dfq.running.profiling import PROFILED_STEPS, TABLE, TRACE
from tests.conftest import SMALL_RECIPE, small_net
from tests.recorded_steps import ForbidHostReads, RecordedSteps
from tests.test_trainer import task, to_live_step

CPU = torch.device("cpu")
LONGER = replace(SMALL_RECIPE, warm_up=6)  # its warm-up steps are recorded, too


def recorded(work: DataFreeTraining) -> DataFreeTraining:
    """`work` with all its steps recorded."""
    lasting = lambda: [value for value in tree_leaves(work.state_dict()) if isinstance(value, Tensor)]  # noqa: E731
    work.execution = work.pool.execution = Execution("on", CPU, recorder=RecordedSteps(lasting))
    return work


def float_students() -> DataFreeTraining:
    students = [nn.Sequential(build_model(ModelSpec("wrn-10-1", 1, 4)), nn.Dropout(0.5)) for _ in range(2)]
    for index, student in enumerate(students):
        torch.manual_seed(index)
        for parameter in student.parameters():
            nn.init.normal_(parameter, std=0.1)
    return DataFreeTraining(
        small_net(), list(students), LONGER, quant=None, input_shape=(1, 12, 12), objective=classifier(4), steps=12,
        seed=0, device=CPU, precision="fp32",
    )  # fmt: skip


MAKERS = {
    "learned ranges": lambda: task(LONGER, steps=12),
    "moving ranges, batch norms that train": lambda: task(
        replace(LONGER, ranges="minmax"), replace(quant_config("W4A4"), batch_norm="train"), steps=12
    ),
    "affine weights": lambda: task(replace(LONGER, ranges="minmax"), quant_config("gdfq-W4A4"), steps=12),
    "float students": float_students,
}


@pytest.mark.parametrize("name", MAKERS)
def test_replayed_steps_are_steps(name: str) -> None:
    """Several generators, one conditional; two students; schedules; snapshots; calibration; metrics of every step."""
    eager, replayed = MAKERS[name](), recorded(MAKERS[name]())
    for index in range(eager.total_steps):
        expected, found = eager.step(index), replayed.step(index)
        assert expected.keys() == found.keys()
        for key, value in expected.items():
            assert torch.equal(value, found[key]), (index, key)
    for one, other in zip(tree_leaves(eager.state_dict()), tree_leaves(replayed.state_dict()), strict=True):
        assert torch.equal(one, other) if isinstance(one, Tensor) else one == other
    assert {("warm-up", "generator 1"), ("warm-up", "generator 2"), ("live", "generator 1"), "student 1",
            "student 2"} <= set(replayed.execution.recorded)  # fmt: skip
    assert (
        sum(name[0] == "images" for name in replayed.execution.recorded) == 4
    )  # the live generator, its average, two snapshots


def test_bf16_steps_are_replayed() -> None:
    works = [task(LONGER, steps=9), recorded(task(LONGER, steps=9))]
    for work in works:
        work.precision = work.pool.precision = "bf16"
        for index in range(work.total_steps):
            work.step(index)
    for one, other in zip(*(tree_leaves(work.state_dict()) for work in works), strict=True):
        assert torch.equal(one, other) if isinstance(one, Tensor) else one == other


def test_a_loaded_state_is_recorded_anew() -> None:
    work, other = (recorded(task(LONGER, steps=6)) for _ in range(2))
    for index in range(2):
        work.step(index)
    first = other.first_step("generator 1 of 2")
    for index in range(first + WARM_UP + 1):
        other.step(index)
    assert other.execution.recorded
    other.load_state_dict(copy.deepcopy(work.state_dict()))
    assert not other.execution.recorded
    for index in range(2, work.total_steps):
        expected, found = work.step(index), other.step(index)
        assert all(torch.equal(value, found[key]) for key, value in expected.items()), index


def test_a_step_that_takes_a_number_from_python_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in can fail: a rate that is a number stays the first one."""

    def numbers(optimizer: torch.optim.Optimizer, value: float) -> None:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * value

    monkeypatch.setattr("dfq.method.trainer.set_learning_rate", numbers)
    eager, replayed = task(LONGER, steps=12), recorded(task(LONGER, steps=12))
    start = eager.first_step("generator 1 of 2")
    for work in (eager, replayed):
        for index in range(start):
            work.step(index)
    differ = [
        index
        for index in range(start, start + LONGER.warm_up)
        for expected, found in [(eager.step(index), replayed.step(index))]
        if not all(torch.equal(value, found[key]) for key, value in expected.items())
    ]
    assert not differ  # a live generator's rate in its warm-up is one number; the second one's follows a cosine
    for index in range(start + LONGER.warm_up, start + 2 * LONGER.warm_up):
        eager.step(index), replayed.step(index)
    one, other = (work.sources[1].generator.to_image.weight for work in (eager, replayed))
    assert not torch.equal(one, other)


@pytest.mark.parametrize("name", MAKERS)
def test_no_step_reads_a_value(name: str) -> None:
    work = MAKERS[name]()
    first = to_live_step(work)
    work.step(first)
    for index in (
        work.first_step("generator 1 of 2"),
        first + 2,
    ):  # a generator's warm-up; a live generator and two students
        with ForbidHostReads():
            metrics = work.step(index)
        assert metrics


@pytest.mark.parametrize("read", [lambda x: x.item(), lambda x: bool(x > 0), lambda x: float(x), lambda x: x.cpu(),
                                  lambda x: x.nonzero()])  # fmt: skip
def test_reading_a_value_in_a_step_is_noticed(read) -> None:
    work = task(replace(LONGER, students=1))
    work.distance = lambda teacher, student: (student.sum() * 0, read(student.detach().sum()))[0]
    to_live_step(work)
    with ForbidHostReads(), pytest.raises(RuntimeError, match="the host would wait"):
        work.student_step(0, 0)


def test_where_a_step_cannot_be_captured_the_reason_is_said_once() -> None:
    class Refusing(RecordedSteps):
        def record(self, function):
            raise RuntimeError("operation not permitted\nwhen stream is capturing")

    asked = Execution("auto", CPU, recorder=Refusing(list))
    total = torch.zeros(())
    with pytest.warns(RuntimeWarning, match="capture: step s cannot be captured: operation not permitted; steps run"):
        for _ in range(WARM_UP + 1):
            asked.step("s", lambda: total.add_(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        asked.step("s", lambda: total.add_(1))
        for _ in range(WARM_UP + 1):
            asked.step("another", lambda: total.add_(1))
    assert float(total) == 2 * (WARM_UP + 1) + 1
    insisted = Execution("on", CPU, recorder=Refusing(list))
    with pytest.raises(ExecutionError, match="step s cannot be captured"):
        for _ in range(WARM_UP + 1):
            insisted.step("s", lambda: total.add_(1))


@pytest.mark.long
def test_compiled_networks_train_alike() -> None:
    recipe = replace(LONGER, generators=SMALL_RECIPE.generators[:1], students=1, warm_up=1)
    eager, compiled = task(recipe), task(recipe)
    compiled.execution = compiled.pool.execution = Execution("off", CPU, compiled=True)
    for index in range(eager.total_steps):
        expected, found = eager.step(index), compiled.step(index)
        for key, value in expected.items():
            assert torch.allclose(value, found[key], rtol=2e-2, atol=1e-5), (index, key)
    source = compiled.sources[0]
    networks = {compiled.fused_teacher, compiled.students[0], source.generator, source.average, *compiled.pool.frozen}
    assert compiled.execution._networks.keys() == networks


def test_a_student_that_is_not_one_graph_is_refused() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            torch._dynamo.graph_break()
            return x

    execution = Execution("off", CPU, compiled=True)
    assert torch.equal(execution.call(Broken(), torch.ones(2)), torch.ones(2))
    torch.compiler.reset()  # what was compiled in two graphs would be taken
    with pytest.raises(ExecutionError, match="compile: Broken cannot be compiled: "):
        execution.call(Broken(), torch.ones(2), fullgraph=True)


@pytest.mark.parametrize("steps", [4, 12])
def test_a_profile_shows_the_last_steps_and_changes_nothing(run_small, tmp_path: Path, steps: int) -> None:
    plain = run_small(steps=steps, out=tmp_path / "plain")
    watched = run_small(steps=steps, out=tmp_path / "watched", profile=True)
    for name, value in plain.model.state_dict().items():
        assert torch.equal(value, watched.model.state_dict()[name])
    events = json.loads((watched.folder / TRACE).read_text())["traceEvents"]
    names = Counter(event["name"] for event in events if event.get("ph") == "X")
    watched_steps = min(PROFILED_STEPS, steps + 1 + 2 * SMALL_RECIPE.warm_up)
    student_steps = 2 * min(steps, watched_steps)  # of two students, one call for all weights and two optimizers each
    assert names["Optimizer.step#SGD.step"] == student_steps
    table = (watched.folder / TABLE).read_text()
    assert "dfq_kernels::" in table and "Self CPU time total" in table
    assert not (plain.folder / TRACE).exists()


@pytest.mark.parametrize(("mode", "rule"), [("yes", "one of auto, on, off"), ("on", "auto or off on cpu")])
def test_wrong_modes_are_refused(mode: str, rule: str) -> None:
    with pytest.raises(ValueError, match=f"dfq: capture must be {rule}, got '{mode}'"):
        Execution(mode, CPU)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_captured_steps_are_steps(precision: str) -> None:
    device = torch.device("cuda")
    works = []
    for mode in ("off", "on"):
        work = task(LONGER, steps=12, device="cuda")
        work.precision = work.pool.precision = precision
        work.execution = work.pool.execution = Execution(mode, device)
        works.append(work)
    for index in range(works[0].total_steps):
        expected, found = (work.step(index) for work in works)
        assert all(torch.equal(value, found[key]) for key, value in expected.items()), index
    assert "student 1" in works[1].execution.recorded and not works[0].execution.recorded
    last = works[1].total_steps - 2
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        works[1].step(last)
    finally:
        torch.cuda.set_sync_debug_mode("default")
