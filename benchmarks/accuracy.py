"""Accuracy of the method and of what it is compared with, on Fashion-MNIST's 10,000 test images, exact forward.

    python -m benchmarks.accuracy [--only TEXT] [--threads N]     runs the rows that are not there yet
    python -m benchmarks.accuracy --assemble                      writes benchmarks/results/accuracy-fashion-mnist.json

Every row is one file in runs/accuracy, so that several processes share the work and an interruption costs one row. A
generator's warm-up depends on its seed, place and terms alone: rows that share a generator share its warm-up.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.machine import machine_line
from benchmarks.rows import command, found_rows, with_commits
from dfq.arguments import pixel_bounds
from dfq.config import RECIPES, GeneratorConfig, Recipe, quant_config, to_json
from dfq.data.images import Batches, load_images
from dfq.method.objective import classifier
from dfq.method.source import Source
from dfq.method.trainer import DataFreeTraining
from dfq.models.embedded import INPUT_SHAPE, load_teacher
from dfq.quant import freeze_ranges, prepare
from dfq.results.evaluate import accuracy
from dfq.running.checkpoint import load_tree, save_tree, write_atomic
from dfq.running.optimizers import load_optimizer
from dfq.running.seeds import random_source

PARTS = Path("runs/accuracy")
RESULT = Path("benchmarks/results/accuracy-fashion-mnist.json")
PRESETS = ("W8A8", "W4A8", "W4A4", "W3A3", "W2A4", "W2A2")
SEEDS = (0, 1, 2)
STEPS = 200
GDFQ_STEPS = 400  # of 128 images: 51,200
CPU = torch.device("cpu")
BOUNDED = "images between black and white"  # as those of `dfq quantize`, which knows the pixels
DEFAULT = RECIPES["default"]
LIVE = GeneratorConfig(live=True, snapshots=())


@dataclass(frozen=True)
class Row:
    """One training: how images are made, what is trained, for how long."""

    table: str
    method: str
    preset: str
    seed: int = 0
    recipe: Recipe = DEFAULT
    steps: int = STEPS
    images: str = "synthetic"

    @property
    def name(self) -> str:
        return f"{self.table} {self.method} {self.preset} seed {self.seed}"

    @property
    def path(self) -> Path:
        key = json.dumps([self.preset, self.seed, to_json(self.recipe), self.steps, self.images, BOUNDED])
        name = re.sub(r"[^\w-]+", "_", f"{self.table}-{self.method}")
        return PARTS / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.json"


def with_live(weight: float, ratio: int, students: int = 1) -> Recipe:
    generators = (*DEFAULT.generators, LIVE)
    return replace(
        DEFAULT, generators=generators, adversary=weight, student_steps_per_generator_step=ratio, students=students
    )


def without_conditional() -> Recipe:
    return replace(DEFAULT, generators=tuple(item for item in DEFAULT.generators if not item.conditional))


def without_snapshots() -> Recipe:
    return replace(DEFAULT, generators=tuple(replace(item, snapshots=(1.0,)) for item in DEFAULT.generators))


def ablations() -> dict[str, Recipe]:
    """What is changed in the default recipe."""
    return {
        "without the BN term": replace(DEFAULT, bn=0.0),
        "without the instance entropy": replace(DEFAULT, instance=0.0),
        "without the batch entropy": replace(DEFAULT, batch=0.0),
        "one generator": replace(DEFAULT, generators=DEFAULT.generators[:1]),
        "without snapshots": without_snapshots(),
        "without the conditional generator": without_conditional(),
        "min/max ranges": replace(DEFAULT, ranges="minmax"),
        "ranges of generated images in place of analytic ones": replace(DEFAULT, rungs=("calibrated", "distilled")),
        "adversary 0.1, 1 generator step to 4": with_live(0.1, 4),
        "adversary 1, 1 generator step to 4": with_live(1.0, 4),
        "adversary 1, 1 generator step to 1": with_live(1.0, 1),
        "adversary 1, 1 to 4, two students": with_live(1.0, 4, students=2),
    }


def rows() -> list[Row]:
    main = [Row("main", "DF-QAT-KD default", preset, seed) for seed in SEEDS for preset in reversed(PRESETS)]
    plain = replace(DEFAULT, rungs=("calibrated", "distilled"))  # Q: ranges of images alone
    real = [
        Row("main", method, preset, recipe=plain, images=method)
        for preset in reversed(PRESETS)
        for method in ("QAT-KD", "QAT")
    ]
    paper = [Row("main", "DF-QAT-KD paper", preset, recipe=RECIPES["paper"]) for preset in reversed(PRESETS)]
    minmax = replace(DEFAULT, ranges="minmax", student_learning_rate=5e-3)
    conventions = {"DF-QAT-KD default": DEFAULT, "DF-QAT-KD default, min/max ranges": minmax}
    gdfq = [
        Row("gdfq", name, f"gdfq-{bits}", seed, recipe, GDFQ_STEPS)
        for seed in SEEDS
        for name, recipe in conventions.items()
        for bits in ("W3A3", "W4A4")
    ]
    ablation = [Row("ablation", name, "W3A3", seed, recipe) for seed in SEEDS for name, recipe in ablations().items()]
    adversary = [row for seed in SEEDS for row in adversaries(seed, minmax)]
    first = len(PRESETS)
    return main[:first] + gdfq + real + paper + main[first:] + ablation + adversary


def adversaries(seed: int, minmax: Recipe) -> list[Row]:
    """A live generator where it could matter: ranges that follow images, weights of three levels."""
    live = with_live(1.0, 4)
    ranges = replace(minmax, generators=live.generators, student_steps_per_generator_step=4)
    return [
        Row("adversary", "adversary 1, 1 generator step to 4", "W2A4", seed, live),
        Row("adversary", "min/max ranges, adversary 1, 1 generator step to 4", "gdfq-W3A3", seed, ranges, GDFQ_STEPS),
    ]


class RealImages:
    """Stands where the pool stands: batches of augmented training images."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches
        self.frozen, self.live = [], []  # type: ignore[var-annotated]

    def batch(self, purpose: str, step: int) -> Tensor:
        offset = int(torch.randint(2**20, (), generator=random_source(0, "real", purpose)))
        return self.batches[offset + step][0].contiguous(memory_format=torch.channels_last)

    def labels(self, purpose: str, step: int) -> Tensor:
        offset = int(torch.randint(2**20, (), generator=random_source(0, "real", purpose)))
        return self.batches[offset + step][1]


class LabelTraining(DataFreeTraining):
    """QAT: the same student, optimizers and steps, on real images and their labels."""

    def student_step(self, index: int, step: int) -> Mapping[str, Tensor]:
        self.labels = self.pool.labels("student0", step)  # type: ignore[attr-defined]
        return super().student_step(index, step)

    def distance(self, teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
        return F.cross_entropy(student_logits.float(), self.labels)


def warm_up(task: DataFreeTraining, source: Source, seed: int) -> None:
    """The source's warm-up, from disk if any row has run it; fills the pool as the trainer would."""
    recipe = task.recipe
    terms = ["label"] if source.config.conditional else ["instance", "batch"]
    settings = ("warm_up", "batch_size", "noise", "width", "generator_learning_rate", "clip", "bn", *terms)
    key = [
        BOUNDED,
        seed,
        source.index,
        source.config.conditional,
        source.config.live,
        *(getattr(recipe, name) for name in settings),
    ]
    path = PARTS / "generators" / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}.safetensors"
    if not path.exists():
        fractions = {max(1, round(part * recipe.warm_up)): str(part) for part in (0.25, 0.5, 1.0)}
        saved: dict[str, Any] = {}
        for step in range(recipe.warm_up):
            task.generator_step(source, "warm-up", step, students=[])
            if step + 1 in fractions:
                saved[fractions[step + 1]] = copy.deepcopy(source.generator.state_dict())
        save_tree(path, {"snapshots": saved, "optimizer": source.optimizer.state_dict()})
    loaded = load_tree(path)
    for fraction in source.config.snapshots:
        source.generator.load_state_dict(loaded["snapshots"][str(fraction)])
        task.add_snapshot(source)
    source.generator.load_state_dict(loaded["snapshots"]["1.0"])
    load_optimizer(source.optimizer, loaded["optimizer"])


def steps_without_generators(task: DataFreeTraining) -> list[int]:
    """The steps of all phases but the generators' warm-up."""
    return [index for index in range(task.total_steps) if not task.phase(index).startswith("generator")]


def run(row: Row) -> Mapping[str, Any]:
    """Trains and judges one row."""
    started = time.monotonic()
    teacher, test = load_teacher(), load_images("fashion-mnist", "test")
    config = quant_config(row.preset, ranges=row.recipe.ranges)
    students: list[nn.Module] = [
        prepare(copy.deepcopy(teacher), INPUT_SHAPE, config) for _ in range(row.recipe.students)
    ]
    kind = LabelTraining if row.images == "QAT" else DataFreeTraining
    task = kind(
        teacher, students, row.recipe, quant=config, input_shape=INPUT_SHAPE, objective=classifier(10), steps=row.steps,
        seed=row.seed, device=CPU, precision="fp32", bounds=pixel_bounds((test.mean, test.std)),
    )  # fmt: skip
    if row.images == "synthetic":
        for source in task.sources:
            warm_up(task, source, row.seed)
    else:
        images = load_images("fashion-mnist", "train")
        task.pool = RealImages(Batches(images, row.recipe.batch_size, row.seed, augmented=True))  # type: ignore[assignment]
    values: dict[str, Any] = {}
    for index in steps_without_generators(task):
        metrics = task.step(index)
    if row.table != "ablation":
        for rung, state in task.rungs.items():
            student = prepare(copy.deepcopy(teacher), INPUT_SHAPE, config)
            student.load_state_dict(state)
            freeze_ranges(student)
            values[rung] = accuracy(student, test, device=CPU)
    freeze_ranges(students[0])
    values["accuracy"] = accuracy(students[0], test, device=CPU)
    values["distillation"] = float(metrics["student0/distillation"])
    described = {"table": row.table, "method": row.method, "preset": row.preset, "seed": row.seed, "steps": row.steps,
                 "images": row.images, "recipe": row.recipe.name}  # fmt: skip
    return {**described, **values, "seconds": round(time.monotonic() - started, 1), "machine": machine_line()}


def assemble() -> None:
    """All rows as one file, with the teacher's accuracy and mean and deviation over seeds."""
    wanted = rows()
    before = json.loads(RESULT.read_text())["rows"] if RESULT.exists() else []
    found = found_rows(wanted, before, ("table", "method", "preset", "seed"))
    machine = machine_line()
    teacher = accuracy(load_teacher(), load_images("fashion-mnist", "test"), device=CPU)
    summary = []
    for preset in PRESETS:
        values = [
            row["accuracy"]
            for row in found
            if row["method"] == "DF-QAT-KD default" and row["preset"] == preset and row["table"] == "main"
        ]
        if values:
            deviation = statistics.stdev(values) if len(values) > 1 else None
            summary.append(
                {"preset": preset, "mean": statistics.mean(values), "deviation": deviation, "seeds": len(values)}
            )
    missing = [f"{row.table}: {row.method} {row.preset} seed {row.seed}" for row in wanted if not row.path.exists()]
    with_commits(found)
    data = {"teacher": teacher, "test_images": 10_000, "steps": STEPS, "batch": DEFAULT.batch_size, "machine": machine,
            "recipes": to_json(RECIPES), "default": summary, "missing": missing, "rows": found}  # fmt: skip
    write_atomic(RESULT, (json.dumps(data, indent=1) + "\n").encode())
    print(f"{len(found)} rows, {len(missing)} missing, in {RESULT}")


if __name__ == "__main__":
    command(__doc__, rows(), run, assemble)
