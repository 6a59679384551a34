"""What a run will take, measured on a few images before its first step."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from dfq.config import LADDER, RECIPES, GeneratorConfig, Recipe, quant_config
from dfq.method.objective import Objective
from dfq.method.trainer import DataFreeTraining
from dfq.network import Network
from dfq.quant import prepare
from dfq.quant.quantizers import weight_layers
from dfq.running.device import autocast

PIXELS, LEAST = 2**15, 2  # of the images that are tried: fewer large ones


@dataclass(frozen=True)
class Rates:
    """Of one image: seconds in a generator's step and in a student's, bytes that the larger keeps for its backward."""

    generator: float
    student: float
    bytes: float


@dataclass(frozen=True)
class Cost:
    """Of a run: seconds of one generator's and of one student's step and of fitting one layer, and how many there are
    of each; bytes that a step keeps for its backward."""

    generator_seconds: float
    student_seconds: float
    generator_steps: int
    student_steps: int
    step_bytes: int
    layer_seconds: float = 0.0
    layers: int = 0

    @property
    def seconds(self) -> float:
        """Of all of these."""
        steps = self.generator_seconds * self.generator_steps + self.student_seconds * self.student_steps
        return steps + self.layer_seconds * self.layers

    def __str__(self) -> str:
        parts = [
            f"{count} {name} of about {seconds:.2g} s"
            for name, count, seconds in (
                ("generator steps", self.generator_steps, self.generator_seconds),
                ("layers to fit", self.layers, self.layer_seconds),
                ("student steps", self.student_steps, self.student_seconds),
            )
            if count
        ]
        return f"{', '.join(parts)}: about {_duration(self.seconds)}, {self.step_bytes / 1e9:.2g} GB in a step"


def cost_of(recipe: Recipe, rates: Rates, *, trained: int, students: int = 1, layers: int = 0) -> Cost:
    """What a recipe takes.

    Args:
        rates: of the networks.
        trained: steps of the whole student, 0 if there are none.
        layers: with weights, of a quantized student.
    """
    live = sum(item.live for item in recipe.generators)
    later = live * -(-trained // recipe.student_steps_per_generator_step)
    fitted = layers if "reconstructed" in recipe.rungs else 0
    seen = recipe.fit.steps * recipe.fit.batch_size + recipe.fit.images  # images, by each layer
    return Cost(
        recipe.batch_size * rates.generator, recipe.batch_size * rates.student * students,
        recipe.warm_up * len(recipe.generators) + later, trained, round(recipe.batch_size * rates.bytes),
        seen * rates.student * students / fitted if fitted else 0.0, fitted,
    )  # fmt: skip


def measured_cost(task: DataFreeTraining) -> Cost | None:
    """Tries one step of each kind; None: the recipe makes no images."""
    if not task.sources:
        return None
    trained = task.steps if "distilled" in task.recipe.rungs or task.quant is None else 0
    layers = 0 if task.quant is None else len(weight_layers(task.students[0]))
    return cost_of(
        task.recipe, measured_rates(task), trained=trained, students=len(task.students), layers=layers
    )  # fmt: skip


def recipe_within(
    minutes: float, teacher: nn.Module, network: Network, objective: Objective, device: torch.device, precision: str
) -> str:  # fmt: skip
    """The name of the best recipe of `LADDER` that takes no longer, as far as a few tried images tell.

    Args:
        teacher, network: as it is, and captured.
        objective, device, precision: as in `DataFreeTraining`.
    """
    quant = quant_config("W4A8", ranges="lsq")
    probe = replace(RECIPES[LADDER[0]], generators=(GeneratorConfig(),))
    student = copy.deepcopy(prepare(network, config=quant))
    task = DataFreeTraining(
        teacher, [student], probe, quant=quant, input_shape=network.input_shape, objective=objective,  # type: ignore[arg-type]
        steps=1, seed=0, device=device, precision=precision, network=network,
    )  # fmt: skip
    rates, layers = measured_rates(task), len(weight_layers(student))
    for name in LADDER[:-1]:
        recipe = RECIPES[name]
        trained = recipe.steps if "distilled" in recipe.rungs else 0
        if cost_of(recipe, rates, trained=trained, layers=layers).seconds <= 60 * minutes:
            return name
    return LADDER[-1]


def measured_rates(task: DataFreeTraining) -> Rates:
    """Tries one step of each kind on a few images, on copies of the networks.

    Steps of whole batches are taken to need as much more time and memory as they have more images.
    """
    recipe = task.recipe
    size = min(max(PIXELS // math.prod(task.input_shape[1:]), LEAST), recipe.batch_size)
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

    first, second = (_tried(step, task) for step in (generator_step, student_step))
    return Rates(first[0] / size, second[0] / size, max(first[1], second[1]) / size)


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
