"""A generator in training: its optimizer, its frozen copies, and the moving average of its weights."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from dfq.config import GeneratorConfig, Recipe
from dfq.method.generator import Generator
from dfq.method.noise import Moments
from dfq.running.optimizers import adam
from dfq.running.seeds import seeded_initialisation


@dataclass
class Source:
    """A generator that is being trained, its optimizer, and where its random numbers come from.

    average: of the weights over its live steps, from those after the warm-up on; None: nobody asked for it.
    """

    config: GeneratorConfig
    generator: Generator
    optimizer: torch.optim.Optimizer
    index: int
    average: Generator | None

    def snapshot_steps(self, warm_up: int) -> list[int]:
        """After how many steps of its warm-up frozen copies join the pool."""
        return sorted({max(1, round(part * warm_up)) for part in self.config.snapshots})

    def frozen_copy(self) -> Generator:
        """The generator as it is now."""
        return copy.deepcopy(self.generator).requires_grad_(False)

    @torch.no_grad()
    def start_average(self) -> None:
        """The average is the generator as it is now."""
        if self.average is not None:
            for mean, now in zip(self.average.parameters(), self.generator.parameters(), strict=True):
                mean.copy_(now)

    @torch.no_grad()
    def follow(self, momentum: float) -> None:
        """`average = momentum * average + (1 - momentum) * generator`."""
        if self.average is not None:
            averages, weights = ([*item.parameters()] for item in (self.average, self.generator))
            torch._foreach_lerp_(averages, weights, 1 - momentum)  # type: ignore[arg-type]


def make_source(
    index: int, config: GeneratorConfig, recipe: Recipe, image_shape: tuple[int, int, int], moments: Moments, *,
    bounds: tuple[Tensor, Tensor] | None, labels: int | None, seed: int, device: torch.device,
) -> Source:  # fmt: skip
    """Generator `index` of a recipe, freshly initialised; labels: how many a conditional one can be asked for."""
    with seeded_initialisation(seed, "generator", index):
        generator = Generator(
            image_shape, noise=recipe.noise, width=recipe.width,
            num_classes=(labels or 0) if config.conditional else 0,
            mean=moments.mean.cpu(), deviation=moments.deviation, bounds=bounds,
        )  # fmt: skip
    generator = generator.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = adam(generator.parameters(), recipe.generator_learning_rate, betas=(0.5, 0.999))
    averaged = config.live and recipe.momentum > 0
    average = copy.deepcopy(generator).requires_grad_(False) if averaged else None
    return Source(config, generator, optimizer, index, average)
