"""The training loop: regressions bought with other people's bugs, interruption, resume, the guard."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import dfq
from dfq.config import RECIPES, GeneratorConfig, LayerBits, quant_config
from dfq.data.images import Images
from dfq.method.objective import classifier
from dfq.method.trainer import DataFreeTraining
from dfq.models import ModelSpec
from dfq.quant import prepare
from dfq.quant.quantizers import weight_layers
from dfq.running.checkpoint import CheckpointError, load_tree
from dfq.running.loop import Interrupted, NonFiniteError
from dfq.running.optimizers import cosine, one_cycle
from tests.conftest import SMALL_RECIPE, small_net, small_run


def task(recipe=SMALL_RECIPE, quant=None, steps=4, seed=0, device="cpu") -> DataFreeTraining:
    quant = quant or quant_config("W3A3", ranges=recipe.ranges)
    students = [prepare(small_net(), (1, 12, 12), quant) for _ in range(recipe.students)]
    return DataFreeTraining(
        small_net(), students, recipe, quant=quant, input_shape=(1, 12, 12), objective=classifier(4), steps=steps,
        seed=seed, device=torch.device(device), precision="fp32",
    )  # fmt: skip


def to_live_step(work: DataFreeTraining) -> int:
    first = work.first_step("student")
    for index in range(first):
        work.step(index)
    return first


def generator_gradient(work: DataFreeTraining) -> torch.Tensor:
    """The generator's gradient of one live step, before clipping matters: its direction."""
    work.step(work.first_step("student"))
    grads = [parameter.grad.flatten() for parameter in work.sources[0].generator.parameters()]
    return torch.cat(grads)


def test_the_adversarial_term_reaches_the_generator_and_depends_on_the_student() -> None:
    only_adversary = replace(SMALL_RECIPE, bn=0.0, instance=0.0, batch=0.0, students=1, clip=1e9)
    first, second = task(only_adversary), task(only_adversary)
    to_live_step(first), to_live_step(second)
    with torch.no_grad():
        second.students[0].get_parameter("fc.weight").mul_(-1)
    one, other = generator_gradient(first), generator_gradient(second)
    assert float(one.norm()) > 1e-6
    assert float((one - other).norm()) > 1e-3 * float(one.norm())


def test_the_generator_step_maximises_disagreement_and_leaves_students_alone() -> None:
    work = task(replace(SMALL_RECIPE, bn=0.0, instance=0.0, batch=0.0, generator_learning_rate=1e-2, students=1))
    to_live_step(work)
    student = {name: value.clone() for name, value in work.students[0].state_dict().items()}
    values = []
    for _ in range(15):  # the same noise every time: the term must fall
        values.append(float(work.generator_step(work.sources[0], "live", 0, work.students)["generator0/adversary"]))
    assert values[-1] < values[0] <= 0
    assert all(torch.equal(value, work.students[0].state_dict()[name]) for name, value in student.items())
    assert all(parameter.grad is None for parameter in work.teacher.parameters())


def test_float_students_are_left_alone_by_the_generator_too() -> None:
    students = [dfq.build_model(ModelSpec("wrn-10-1", 1, 4))]
    work = DataFreeTraining(
        small_net(), students, replace(SMALL_RECIPE, students=1), quant=None, input_shape=(1, 12, 12),
        objective=classifier(4), steps=2, seed=0, device=torch.device("cpu"), precision="fp32",
    )  # fmt: skip
    before = {name: value.clone() for name, value in students[0].state_dict().items()}
    work.generator_step(work.sources[0], "live", 0, work.students)
    assert all(torch.equal(value, students[0].state_dict()[name]) for name, value in before.items())


def test_a_frozen_teacher_still_gives_a_student_that_learns(run_small) -> None:
    net = small_net().requires_grad_(False)
    result = run_small(model=net)
    assert not torch.equal(result.model.get_parameter("conv2.weight"), net.conv2.weight)


def test_resume_needs_the_same_teacher(run_small) -> None:
    run_small()
    other = small_net()
    with torch.no_grad():
        other.fc.bias.add_(1)
    with pytest.raises(CheckpointError, match="weights must be .* to resume"):
        run_small(model=other, resume=True)


def test_a_folder_with_other_files_is_left_alone(run_small, tmp_path: Path) -> None:
    (tmp_path / "run" / "tensorboard").mkdir(parents=True)
    (tmp_path / "run" / "model.safetensors").write_text("mine")
    for resume in (False, True):
        with pytest.raises(CheckpointError, match="out must be a new or empty folder"):
            run_small(resume=resume)
    assert (tmp_path / "run" / "model.safetensors").read_text() == "mine" and (
        tmp_path / "run" / "tensorboard"
    ).is_dir()


@pytest.mark.parametrize("snapshots", [(0.0,), (1.5,), ()])
def test_recipes_with_an_empty_pool_are_refused(snapshots: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="snapshots must be fractions|generators must be none, or at least one that"):
        replace(SMALL_RECIPE, generators=(GeneratorConfig(snapshots=snapshots),))


def test_warm_up_uses_the_teacher_alone_and_fills_the_pool() -> None:
    work = task()
    start = work.first_step("generator 1 of 2")
    metrics = work.step(start)
    assert set(metrics) == {"generator0/bn", "generator0/instance", "generator0/batch"}
    for index in range(start + 1, work.first_step("calibrate")):
        metrics = work.step(index)
    assert set(metrics) == {"generator1/bn", "generator1/label"}
    assert len(work.pool.frozen) == 2 and len(work.pool.live) == 1 and work.snapshot_owners == [0, 1]
    assert not any(parameter.requires_grad for item in work.pool.frozen for parameter in item.parameters())


def test_a_step_trains_each_student_on_images_of_its_own() -> None:
    work = task()
    first = to_live_step(work)
    assert set(work.rungs) == {"analytic", "calibrated", "reconstructed"}
    assert float(work.students[0].get_buffer("quantizers.x_8.running_max")) > 0
    metrics = work.step(first)
    assert {"student0/distillation", "student1/distillation", "generator0/adversary"} <= set(metrics)
    assert float(metrics["student0/distillation"]) != float(metrics["student1/distillation"])
    assert "generator0/adversary" not in work.step(first + 1)  # one generator step to two student steps


def test_training_helps() -> None:
    recipe = replace(
        SMALL_RECIPE, warm_up=20, students=1, batch_size=32, generators=(GeneratorConfig(),),
        rungs=("calibrated", "distilled"),
    )  # fmt: skip
    work = task(recipe, quant_config("W2A2", ranges="lsq"), steps=60)
    losses = [float(work.step(index).get("student0/distillation", torch.nan)) for index in range(work.total_steps)]
    losses = losses[-60:]
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])


def test_rounds_mix_all_frozen_members_and_repeat() -> None:
    generators = (GeneratorConfig(), GeneratorConfig(conditional=True))
    work = task(replace(SMALL_RECIPE, generators=generators, mirrored=False))
    to_live_step(work)
    round_of_two = torch.cat([work.pool.batch("test", step) for step in range(2)])
    apart = torch.cat([work.pool.draw(item, "test", index, 0)[0] for index, item in enumerate(work.pool.frozen)])
    assert not torch.equal(round_of_two, apart)
    assert torch.equal(round_of_two.sum((1, 2, 3)).sort().values, apart.sum((1, 2, 3)).sort().values)
    assert not torch.equal(work.pool.batch("test", 0), work.pool.batch("test", 2))
    assert torch.equal(work.pool.batch("test", 0), round_of_two[: SMALL_RECIPE.batch_size])


def states_equal(one: Path, other: Path) -> bool:
    first, second = load_tree(one / "checkpoint.safetensors"), load_tree(other / "checkpoint.safetensors")

    def same(a, b) -> bool:
        if isinstance(a, torch.Tensor):
            return torch.equal(a, b)
        if isinstance(a, dict):
            return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
        if isinstance(a, (list, tuple)):
            return len(a) == len(b) and all(map(same, a, b))
        return a == b

    return same(first, second)


class StopAt:
    """Sends this process a signal behind a step."""

    def __init__(self, step: int, number: int = signal.SIGTERM) -> None:
        self.step, self.number = step, number

    def on_step(self, phase, index, total, metrics) -> None:
        if index == self.step:
            os.kill(os.getpid(), self.number)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory):
    return small_run(tmp_path_factory.mktemp("whole") / "run")


# after the first ranges, in a generator's warm-up, at the calibration, among layers and student steps; by either signal
@pytest.mark.parametrize(("step", "number"), [(0, signal.SIGINT), (5, signal.SIGTERM), (7, signal.SIGINT),
                                              (10, signal.SIGTERM), (14, signal.SIGINT)])  # fmt: skip
def test_an_interrupted_run_resumes_to_the_same_bits(run_small, whole, tmp_path: Path, step: int, number: int) -> None:
    with pytest.raises(Interrupted, match=f"interrupted after step {step + 1} of 17; continue with --resume") as stop:
        run_small(out=tmp_path / "cut", observer=StopAt(step, number))
    assert stop.value.signal_number == number
    resumed = run_small(out=tmp_path / "cut", resume=True)
    assert states_equal(whole.folder, tmp_path / "cut")
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    assert [row["step"] for row in read_metrics(tmp_path / "cut")] == list(range(17))
    assert read_metrics(tmp_path / "cut") == read_metrics(whole.folder)


def read_metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


KILLED = """
import sys
import dfq, dfq.running.loop
from tests.conftest import SMALL_RECIPE, small_net
class Slow:
    def on_step(self, phase, index, total, metrics):
        print(index, flush=True)
        if index >= 7 and "--resume" not in sys.argv:
            import time; time.sleep(60)
original = dfq.api.run_loop
dfq.api.run_loop = lambda *a, **k: original(*a, **k, save_seconds=0.0)
dfq.quantize(small_net(), input_shape=(1, 12, 12), num_classes=4, preset="W3A3", recipe=SMALL_RECIPE, steps=4,
             out=sys.argv[1], precision="fp32", resume="--resume" in sys.argv, observer=Slow())
"""


def test_a_killed_run_resumes_to_the_same_bits(whole, tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path / "cut")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while process.stdout.readline().strip() != "7":
        assert time.monotonic() < deadline and process.poll() is None
    process.kill()
    process.wait()
    # what a power cut leaves: half a line behind the last whole one
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "pha')
    assert load_tree(tmp_path / "cut" / "checkpoint.safetensors")["next_step"] in (7, 8)
    subprocess.run([*command, "--resume"], check=True, stdout=subprocess.DEVNULL)
    assert states_equal(whole.folder, tmp_path / "cut")
    assert read_metrics(tmp_path / "cut") == read_metrics(whole.folder)


def test_resume_needs_the_same_settings(run_small) -> None:
    run_small()
    with pytest.raises(CheckpointError, match="out must be a new folder or resume must be set"):
        run_small()
    with pytest.raises(CheckpointError, match="steps must be 4 to resume .* got 5"):
        run_small(steps=5, resume=True)
    assert run_small(resume=True).folder.exists()  # a finished run is finished again, at once


def test_same_seed_same_bits_other_seed_other_bits(run_small, tmp_path: Path) -> None:
    states = [run_small(out=tmp_path / str(i), seed=seed).model.state_dict() for i, seed in enumerate((3, 3, 4))]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert not all(torch.equal(value, states[2][name]) for name, value in states[0].items())


def test_a_non_finite_loss_stops_the_run_and_names_the_term(run_small, tmp_path: Path) -> None:
    diverging = replace(SMALL_RECIPE, student_learning_rate=1e30, clip=1e30)
    with pytest.raises(
        NonFiniteError, match=r"train: (student0/distillation|generator0/adversary) must be finite, got"
    ):
        run_small(recipe=diverging, steps=8)
    assert (tmp_path / "run" / "config.json").exists()


def test_weights_that_are_not_finite_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    net = small_net()
    with torch.no_grad():
        net.fc.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="model must have finite weights"):
        dfq.quantize(net, input_shape=(1, 12, 12), num_classes=4, recipe=SMALL_RECIPE, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def images(count: int, channels: int = 1, classes: int = 4) -> Images:
    pixels, labels = torch.zeros(count, channels, 12, 12, dtype=torch.uint8), torch.zeros(count, dtype=torch.int64)
    return Images(pixels, labels, (0.5,) * channels, (0.5,) * channels, classes)


@pytest.mark.parametrize(
    ("keywords", "text"),
    [
        ({"preset": "W9A4"}, r"weights must be in \[2, 8\], got 9"),
        ({"preset": "W4A1"}, r"activations must be in \[2, 8\], got 1"),
        ({"preset": "int4"}, "preset must be one of W8A8.*got 'int4'"),
        (
            {"recipe": "best"},
            "recipe must be one of paper, default, analytic, calibrate, reconstruct, few, distill, got 'best'",
        ),
        ({"steps": 0}, "steps must be an integer of at least 1, got 0"),
        ({"steps": 2.5}, "steps must be an integer of at least 1, got 2.5"),
        ({"config": quant_config("W4A4")}, "config must be given without preset and overrides, got both"),
        ({"model": small_net().half()}, r"model must be float32 .*, got conv1.weight of torch.float16"),
        ({"model": small_net().to("meta")}, "model must hold its weights, got conv1.weight on the meta device"),
        ({"test_images": "images"}, r"test_images must be dfq.data.Images, got str"),
        ({"test_images": images(0)}, "test_images must hold at least one image, got none"),
        ({"test_images": images(2, channels=3)}, r"model's image shape \(1, 12, 12\), got \(3, 12, 12\)"),
        ({"test_images": images(2, classes=5)}, "at most the model's 4 classes, got 5"),
        ({"input_shape": (3, 12, 12)}, r"model must accept images of \(3, 12, 12\)"),
        ({"num_classes": 5}, r"model must give logits \[N, num_classes=5\], got \(2, 4\)"),
        ({"device": "tpu"}, "device must be auto, cpu, cuda or cuda:N, got 'tpu'"),
        ({"precision": "fp8"}, "precision must be one of auto, fp32, bf16, got 'fp8'"),
    ],
)
def test_wrong_arguments(run_small, tmp_path: Path, keywords: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text) as error:
        run_small(**keywords)
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_students_and_teachers_that_do_not_fit_are_refused_before_training(tmp_path: Path) -> None:
    wrong = dfq.build_model(ModelSpec("wrn-10-1", 1, 5))
    common = {"input_shape": (1, 12, 12), "recipe": SMALL_RECIPE, "steps": 2, "out": tmp_path / "run"}
    with pytest.raises(ValueError, match=r"distill: students\[0\] must give logits .*4\], got \(2, 5\)"):
        dfq.distill(small_net(), [wrong], num_classes=4, **common)
    with pytest.raises(ValueError, match=r"distill: teacher must give logits .*5\], got \(2, 4\)"):
        dfq.distill(small_net(), [wrong], num_classes=5, **common)
    with pytest.raises(ValueError, match=r"teach: model must give logits \[N, num_classes=3\], got \(2, 4\)"):
        dfq.teach(ModelSpec("tests.conftest:small_net", 1, 3), images(8, classes=3), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_config_of_one_s_own(run_small) -> None:
    config = replace(quant_config("W4A4", ranges="minmax"), last=LayerBits(6, 7))
    result = run_small(preset=None, config=config)
    bits = {name: quantizer.bits for name, quantizer, _ in weight_layers(result.model)}
    assert bits == {"conv1": 8, "conv2": 4, "conv3": 4, "shortcut": 4, "fc": 6}
    saved = json.loads((result.folder / "config.json").read_text())["config"]
    assert saved["preset"] is None and saved["quant"]["ranges"] == "minmax" != saved["recipe"]["ranges"]


def test_the_model_that_is_passed_in_is_not_changed(run_small) -> None:
    net = small_net()
    before = copy.deepcopy(net.state_dict())
    dfq.quantize(
        net, input_shape=(1, 12, 12), num_classes=4, recipe=SMALL_RECIPE, steps=2, out=run_small().folder / "b"
    )
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in before.items())


def test_students_of_other_architectures_learn_together(tmp_path: Path) -> None:
    specs = [ModelSpec("wrn-10-1", 1, 4), ModelSpec("resnet20", 1, 4)]
    students = [dfq.api.seeded_model(spec, 0, index) for index, spec in enumerate(specs)]
    result = dfq.distill(
        small_net(), students, input_shape=(1, 12, 12), num_classes=4, recipe=SMALL_RECIPE, steps=3,
        out=tmp_path / "run", specs=[ModelSpec("wrn-16-1", 1, 4), *specs],
    )  # fmt: skip
    assert result.model is students[0] and result.calibrated is None
    loaded, _ = dfq.load_run(tmp_path / "run")
    state = result.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())


def test_bf16_autocast_trains(run_small) -> None:
    result = run_small(precision="bf16")
    assert all(torch.isfinite(value).all() for value in result.model.state_dict().values())


def test_schedules() -> None:
    assert cosine(0, 10) == 1 and cosine(10, 10) == pytest.approx(0) and cosine(5, 10) == pytest.approx(0.5)
    assert one_cycle(0, 100) == pytest.approx(1 / 25) and one_cycle(30, 100) == pytest.approx(1)
    assert one_cycle(99, 100) < 1e-2


def test_recipes_are_data() -> None:
    assert RECIPES["paper"].generators[0].live and RECIPES["paper"].ranges == "minmax"
    assert len(RECIPES["default"].generators) >= 2 and not any(item.live for item in RECIPES["default"].generators)


def test_a_model_that_is_another_one_when_captured_is_refused(run_small, tmp_path: Path) -> None:
    class Branches(type(small_net())):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x if type(x) is torch.Tensor else 2 * x)

    net = small_net()
    net.__class__ = Branches
    with pytest.raises(
        ValueError, match=r"same when torch.export captures it, got an output 0 that differs by \d+\.\d%"
    ):
        run_small(model=net)
    assert not list(tmp_path.iterdir())
