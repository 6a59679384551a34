"""What one step of the algorithm does: every weight, rate, clip and count of a recipe shows in it."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import nn

from dfq.config import GeneratorConfig, quant_config
from dfq.method.losses import distillation
from dfq.quant.quantizers import ActivationQuantizer
from dfq.running.optimizers import cosine
from tests.conftest import SMALL_RECIPE
from tests.test_trainer import task, to_live_step

ONE = replace(SMALL_RECIPE, students=1)


def ranges(student: nn.Module) -> list[float]:
    return [float(item.running_max) for item in student.modules() if isinstance(item, ActivationQuantizer)]


@pytest.mark.parametrize("name", ["bn", "instance", "batch", "label", "adversary"])
def test_every_weight_of_a_recipe_scales_its_term(name: str) -> None:
    values = []
    generators, student = reference_states()
    for weight in (1.0, 3.0):
        work = task(replace(ONE, **{name: weight}))
        to_live_step(work)
        source = work.sources[1 if name == "label" else 0]
        for other in work.sources:  # the same generators, whatever the warm-up did
            other.generator.load_state_dict(generators[other.index])
        work.students[0].load_state_dict(student)
        values.append(float(work.generator_step(source, "live", 0, work.students)[f"generator{source.index}/{name}"]))
    assert values[0] != 0 and values[1] == pytest.approx(3 * values[0], rel=1e-5)


@cache
def reference_states() -> tuple[list[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """Of fresh generators, and of a student at the first live step."""
    work = task(ONE)
    generators = [deepcopy(source.generator.state_dict()) for source in work.sources]
    to_live_step(work)
    return generators, deepcopy(work.students[0].state_dict())


def test_the_adversary_is_the_sum_over_all_students() -> None:
    work = task()  # two students
    to_live_step(work)
    with torch.no_grad():
        work.students[1].get_parameter("fc.weight").mul_(-1)
        images, _ = work.pool.draw(work.sources[0].generator, "live", 0, 0)
        logits = work.fused_teacher(images)
        apart = [float(distillation(logits, student.train()(images))) for student in work.students]
    found = float(work.generator_step(work.sources[0], "live", 0, work.students)["generator0/adversary"])
    assert apart[0] != apart[1] and found == pytest.approx(-sum(apart), rel=1e-4)


def test_ranges_follow_the_student_s_own_steps_alone() -> None:
    work = task(replace(ONE, ranges="minmax"))
    to_live_step(work)
    before = ranges(work.students[0])
    work.generator_step(work.sources[0], "live", 0, work.students)
    assert ranges(work.students[0]) == before
    work.student_step(0, 0)
    assert all(found != old for found, old in zip(ranges(work.students[0]), before, strict=True))


def test_rates_follow_the_schedules() -> None:
    work = task(steps=8)
    first = to_live_step(work)
    for step in range(5):
        work.step(first + step)
    for optimizer in work.optimizers[0]:
        for group in optimizer.param_groups:
            rate = float(group["lr"])
            assert rate == pytest.approx(group["peak"] * cosine(4, 8)) and 0 < rate < group["peak"]
    live, frozen = (source.optimizer.param_groups[0] for source in work.sources)
    assert float(live["lr"]) == pytest.approx(live["peak"] * cosine(4, 8))
    assert float(frozen["lr"]) == pytest.approx(frozen["peak"] * cosine(2, 3))  # its warm-up's last step
    assert [optimizer.param_groups[0].get("weight_decay") for optimizer in work.optimizers[0]] == [1e-4, 0]


def test_gradients_are_clipped() -> None:
    for clip in (1e-3, 1e3):
        work = task(replace(ONE, clip=clip))
        to_live_step(work)
        work.generator_step(work.sources[0], "live", 0, work.students)
        work.student_step(0, 0)
        for module in (work.sources[0].generator, work.students[0]):
            grads = [parameter.grad.flatten() for parameter in module.parameters()]
            norm = float(torch.cat(grads).norm())
            assert norm == pytest.approx(clip, rel=1e-3) if clip < 1 else 1e-3 < norm < clip


def test_calibration_sees_as_many_batches_as_the_recipe_says(monkeypatch: pytest.MonkeyPatch) -> None:
    work = task(replace(ONE, calibration_batches=5))
    asked = []
    batch = work.pool.batch
    monkeypatch.setattr(work.pool, "batch", lambda purpose, step: asked.append((purpose, step)) or batch(purpose, step))
    for index in range(work.first_step("calibrate") + 1):
        work.step(index)
    assert asked == [("calibrate", step) for step in range(5)]


def test_snapshots_are_taken_at_their_fractions() -> None:
    generators = (GeneratorConfig(snapshots=(1.0, 0.25, 0.5)), GeneratorConfig(live=True, snapshots=(0.5,)))
    work = task(replace(ONE, generators=generators, warm_up=8))
    seen = []
    first = work.first_step("generator 1 of 2")
    for index in range(16):
        work.step(first + index)
        seen.append({name: value.clone() for name, value in work.sources[index // 8].generator.state_dict().items()})
    assert work.pool_names() == ["generator 1, step 2", "generator 1, step 4", "generator 1, step 8",
                                 "generator 2, step 4", "generator 2, live"]  # fmt: skip
    for frozen, step in zip(work.pool.frozen, (2, 4, 8, 12), strict=True):
        assert all(torch.equal(value, seen[step - 1][name]) for name, value in frozen.state_dict().items())


def test_a_label_is_as_long_as_the_noise() -> None:
    """Its column of the first layer is scaled by the square root of the noise's length."""
    work = task()
    generator = work.sources[1].generator
    heard = []
    generator.project.register_forward_pre_hook(lambda _, inputs: heard.append(inputs[0]))
    _, labels = work.pool.draw(generator, "live", 1, 0)
    one_hot = heard[0][:, generator.noise :]
    assert torch.equal(one_hot.argmax(1), labels)
    assert torch.allclose(one_hot.norm(dim=1), torch.tensor(float(generator.noise)).sqrt())


@pytest.mark.gpu
def test_a_step_never_waits_for_the_gpu() -> None:
    work = task(ONE, quant_config("W4A4", ranges="lsq"), steps=8, device="cuda")
    first = to_live_step(work)
    for index in range(first, first + 2):  # a generator's and a student's first step may allocate and compile
        work.step(index)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert "generator0/adversary" in work.step(first + 2)  # two student steps to one of a generator
    finally:
        torch.cuda.set_sync_debug_mode("default")
