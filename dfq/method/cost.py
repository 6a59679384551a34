"""What a run will take, measured on a few images before its first step."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from dfq.method.trainer import DataFreeTraining
from dfq.running.device import autocast

PIXELS, LEAST = 2**15, 2  # of the images that are tried: fewer large ones


@dataclass(frozen=True)
class Cost:
    """Of a run: seconds of one generator's and of one student's step, and how many there are of both; bytes that the
    larger of them keeps for its backward."""

    generator_seconds: float
    student_seconds: float
    generator_steps: int
    student_steps: int
    step_bytes: int

    @property
    def seconds(self) -> float:
        """Of all these steps."""
        return self.generator_seconds * self.generator_steps + self.student_seconds * self.student_steps

    def __str__(self) -> str:
        parts = [
            f"{count} {name} steps of about {seconds:.2g} s"
            for name, count, seconds in (
                ("generator", self.generator_steps, self.generator_seconds),
                ("student", self.student_steps, self.student_seconds),
            )
            if count
        ]
        return f"{', '.join(parts)}: about {_duration(self.seconds)}, {self.step_bytes / 1e9:.2g} GB in a step"


def measured_cost(task: DataFreeTraining) -> Cost | None:
    """Tries one step of each kind on a few images, on copies; None: the recipe makes no images.

    Steps of whole batches are taken to need as much more time and memory as they have more images.
    """
    if not task.sources:
        return None
    recipe, students = task.recipe, len(task.students)
    size = min(max(PIXELS // math.prod(task.input_shape[1:]), LEAST), recipe.batch_size)
    live = sum(source.config.live for source in task.sources)
    trained = task.steps if "distilled" in recipe.rungs or task.quant is None else 0
    later = live * -(-trained // recipe.student_steps_per_generator_step)
    generator = copy.deepcopy(task.sources[0].generator)
    z, labels = task.pool.noise(generator, "cost", 0, 0)
    z, labels = z[:size], None if labels is None else labels[:size]
    student = copy.deepcopy(task.students[0]).train()

    def generator_step() -> None:
        images = generator(z, labels)
        with task.bn_statistics as statistics:
            logits = task.fused_teacher(images)
            terms = [statistics.loss(), *task.objective.entropies(logits).values()]
        torch.stack(terms).sum().backward(inputs=list(generator.parameters()))

    def student_step() -> None:
        with torch.no_grad():
            images = generator(z, labels)
            wanted = task.fused_teacher(images)
        task.distance(wanted, student(images)).backward()

    share = recipe.batch_size / size
    first, second = (_tried(step, task) for step in (generator_step, student_step))
    return Cost(
        share * first[0], share * second[0] * students, recipe.warm_up * len(task.sources) + later, trained,
        round(share * max(first[1], second[1])),
    )  # fmt: skip


def _tried(step: Callable[[], None], task: DataFreeTraining) -> tuple[float, int]:
    """Seconds of the second call, and bytes that it keeps for its backward."""
    seconds, kept = 0.0, dict[int, int]()
    for _ in range(2):
        started = time.perf_counter()
        with autocast(task.device, task.precision), _watched(kept):
            step()
        if task.device.type == "cuda":
            torch.cuda.synchronize(task.device)
        seconds = time.perf_counter() - started
    return seconds, sum(kept.values())


@contextmanager
def _watched(kept: dict[int, int]) -> Iterator[None]:
    """Notes the storages that the graph keeps: bytes by address."""
    kept.clear()

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 6000 else f"{seconds / 3600:.1f} hours"
