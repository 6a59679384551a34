"""Float students from nothing, on Fashion-MNIST: without data, and on real images as far as that goes.

    python -m benchmarks.students [--only TEXT] [--threads N]     runs the rows that are not there yet
    python -m benchmarks.students --assemble                      writes benchmarks/results/students-fashion-mnist.json

Every row is one file in runs/students, so that several processes share the work. A row of real images (KD) has the same
student, first weights, steps, rates and distance; only its images are the 60,000 training images, shifted and mirrored.
"""

from __future__ import annotations

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

from benchmarks.accuracy import CPU, RealImages
from benchmarks.machine import machine_line
from benchmarks.rows import command, found_rows, with_commits
from dfq.api import seeded_model
from dfq.config import RECIPES, GeneratorConfig, Recipe, to_json
from dfq.data.images import Batches, load_images
from dfq.method.objective import classifier
from dfq.method.trainer import DataFreeTraining
from dfq.models.embedded import INPUT_SHAPE, SPEC, load_teacher
from dfq.results.evaluate import accuracy
from dfq.running.checkpoint import write_atomic

PARTS = Path("runs/students")
RESULT = Path("benchmarks/results/students-fashion-mnist.json")
SEEDS = (0, 1, 2)
STEPS, FEWER = 6_000, 1_000  # of the main table, of what is compared with each other
CMI_STEPS = 3_000  # of `examples/against_cmi.py`
WEAK = "wrn-10-1"  # its images matter most, and its steps are cheap
DISTILL = RECIPES["distill"]
LIVE = GeneratorConfig(live=True, snapshots=())
STUDENTS = ("wrn-16-1", "wrn-10-1", "resnet20", "mobilenet-v2")


@dataclass(frozen=True)
class Row:
    """One training: the product's name and those of other students, how images are made, for how long."""

    table: str
    method: str
    students: tuple[str, ...] = ("wrn-16-1",)
    seed: int = 0
    recipe: Recipe = DISTILL
    steps: int = STEPS
    real: bool = False

    @property
    def name(self) -> str:
        return f"{self.table} {self.method} {self.students[0]} seed {self.seed}"

    @property
    def path(self) -> Path:
        key = json.dumps([self.students, self.seed, to_json(self.recipe), self.steps, self.real])
        name = re.sub(r"[^\w-]+", "_", f"{self.table}-{self.method}-{self.students[0]}")
        return PARTS / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.json"


def changed() -> dict[str, Recipe]:
    """What is changed in the recipe for float students."""
    return {
        "as it is": DISTILL,
        "batch-norm term with weight 16 in place of 4": replace(DISTILL, bn=16.0),
        "without the adversary": replace(DISTILL, adversary=0.0),
        "adversary with weight 0.3": replace(DISTILL, adversary=0.3),
        "without the average": replace(DISTILL, momentum=0.0),
        "without the teacher's maps": replace(DISTILL, attention=0.0),
        "without mirrored images": replace(DISTILL, mirrored=False),
    }


def rows() -> list[Row]:
    main = [Row("main", "without data", seed=seed) for seed in SEEDS]
    real = [Row("main", "KD on real images", seed=seed, real=True) for seed in SEEDS]
    others = [
        Row("main", method, (student,), real=real)
        for student in STUDENTS[1:]
        for method, real in (("without data", False), ("KD on real images", True))
    ]
    table = [
        Row(
            "generators", f"{generators}x{students}", (WEAK,) * students, seed,
            replace(DISTILL, generators=(LIVE,) * generators, students=students), FEWER,
        )
        for seed in SEEDS for generators, students in ((2, 1), (1, 2), (2, 2))  # 1x1 is the recipe as it is
    ]  # fmt: skip
    ablation = [
        Row("ablation", name, (WEAK,), seed, recipe, FEWER) for seed in SEEDS for name, recipe in changed().items()
    ]
    against = Row("cmi", "without data", steps=CMI_STEPS)
    return [*main[:1], *real[:1], *main[1:], *others, *real[1:], against, *ablation, *table]


def run(row: Row) -> Mapping[str, Any]:
    """Trains and judges one row."""
    started = time.monotonic()
    test = load_images("fashion-mnist", "test")
    students = [seeded_model(replace(SPEC, name=name), row.seed, index) for index, name in enumerate(row.students)]
    recipe = replace(row.recipe, generators=()) if row.real else row.recipe
    task = DataFreeTraining(
        load_teacher(), list(students), recipe, quant=None, input_shape=INPUT_SHAPE, objective=classifier(10),
        steps=row.steps, seed=row.seed, device=CPU, precision="bf16",
    )  # fmt: skip
    if row.real:
        batches = Batches(load_images("fashion-mnist", "train"), recipe.batch_size, row.seed, augmented=True)
        task.pool = RealImages(batches)  # type: ignore[assignment]
    for index in range(task.total_steps):
        metrics = task.step(index)
    return {
        "table": row.table, "method": row.method, "students": list(row.students), "seed": row.seed, "steps": row.steps,
        "recipe": row.recipe.name, "accuracy": accuracy(students[0], test, device=CPU),
        "distillation": float(metrics["student0/distillation"]), "seconds": round(time.monotonic() - started, 1),
        "threads": torch.get_num_threads(), "machine": machine_line(),
    }  # fmt: skip


def assemble() -> None:
    """All rows as one file, with mean and deviation over seeds."""
    wanted = rows()
    before = json.loads(RESULT.read_text())["rows"] if RESULT.exists() else []
    found = found_rows(wanted, before, ("table", "method", "students", "seed", "steps"))
    groups: dict[tuple[str, ...], list[float]] = {}
    for row in found:
        groups.setdefault((row["table"], row["method"], row["students"][0]), []).append(row["accuracy"])
    summary = [
        {
            "table": table, "method": method, "student": student, "mean": statistics.mean(values),
            "deviation": statistics.stdev(values) if len(values) > 1 else None, "seeds": len(values),
        }
        for (table, method, student), values in groups.items()
    ]  # fmt: skip
    teacher = accuracy(load_teacher(), load_images("fashion-mnist", "test"), device=CPU)
    machine = machine_line()
    with_commits(found)
    there = {(row["table"], row["method"], row["students"][0], row["seed"]) for row in found}
    missing = [
        f"{row.table}: {row.method} {row.students[0]} seed {row.seed}"
        for row in wanted
        if (row.table, row.method, row.students[0], row.seed) not in there
    ]
    data = {"teacher": teacher, "test_images": 10_000, "batch": DISTILL.batch_size, "machine": machine,
            "recipe": to_json(DISTILL), "summary": summary, "missing": missing, "rows": found}  # fmt: skip
    write_atomic(RESULT, (json.dumps(data, indent=1) + "\n").encode())
    print(f"{len(found)} rows, {len(missing)} missing, in {RESULT}")


if __name__ == "__main__":
    command(__doc__, rows(), run, assemble)
