"""The pool of generators that students learn from: frozen snapshots and live ones.

Frozen members are drawn from in rounds: every member makes one batch, the images are shuffled, and the round is dealt
out as batches in which all members are mixed. A round is a function of the seed and its index, so a resumed run makes
it again. Live members change while they are used; each makes whole batches of its own, or half of them where the moving
average of its weights makes the other half. Where there are real images, half of every batch is drawn from them.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from dfq.method.generator import Generator
from dfq.running.device import autocast
from dfq.running.execution import Execution
from dfq.running.seeds import random_source


class ImagePool:
    """Images as a function of (seed, purpose, step).

    Args:
        execution: who runs the generators.
        batch_size: images per batch.
        seed: of all noise.
        device, precision: where and how generators run.
        real: images of the user, `[N, C, H, W]`.
        mirrored: half of the generated images are mirrored.
    """

    def __init__(
        self, execution: Execution, *, batch_size: int, seed: int, device: torch.device, precision: str,
        real: Tensor | None = None, mirrored: bool = False,
    ) -> None:  # fmt: skip
        self.execution = execution
        self.batch_size, self.seed, self.device, self.precision = batch_size, seed, device, precision
        self.frozen: list[Generator] = []
        self.live: list[tuple[Generator, Generator | None]] = []  # and the average of its weights
        self.mirrored = mirrored
        self.real = None if real is None else real.to(device, memory_format=torch.channels_last)
        self._rounds: dict[str, tuple[int, Tensor]] = {}  # the current one of each purpose

    def noise(self, generator: Generator, purpose: str, member: int, step: int) -> tuple[Tensor, Tensor | None]:
        """A batch's noise, and the labels that a conditional generator is asked for."""
        random = random_source(self.seed, "noise", purpose, member, step, device=self.device)
        z = torch.randn(self.batch_size, generator.noise, generator=random, device=self.device)
        if not generator.num_classes:
            return z, None
        size = (self.batch_size,)
        return z, torch.randint(generator.num_classes, size, generator=random, device=self.device)

    def images(self, generator: Generator, z: Tensor, labels: Tensor | None) -> Tensor:
        """What a generator makes of noise and labels."""
        with autocast(self.device, self.precision):
            return self.execution.call(generator, z, labels)

    @torch.no_grad()
    def draw(self, generator: Generator, purpose: str, member: int, step: int) -> tuple[Tensor, Tensor | None]:
        """One batch of one generator, and the labels that it was asked for."""
        z, labels = self.noise(generator, purpose, member, step)
        return self.execution.step(("images", id(generator)), partial(self.images, generator), z, labels), labels

    @torch.no_grad()
    def batch(self, purpose: str, step: int) -> Tensor:
        """The images of a step: generated ones; if there are real ones, half of each, if there are only those, they."""
        if self.real is None:
            return self.generated(purpose, step)
        random = random_source(self.seed, "real", purpose, step)
        rows = torch.randint(len(self.real), (self.batch_size,), generator=random).to(self.device)
        if not self.frozen and not self.live:
            return self.real[rows]
        half = self.batch_size // 2
        mixed = torch.cat([self.real[rows[:half]], self.generated(purpose, step)[half:]])
        return mixed.contiguous(memory_format=torch.channels_last)

    @torch.no_grad()
    def generated(self, purpose: str, step: int) -> Tensor:
        """Images of generators: frozen members mixed, live members in turn."""
        images = self._dealt(purpose, step)
        if not self.mirrored:
            return images
        random = random_source(self.seed, "mirror", purpose, step, device=self.device)
        mirrored = torch.rand(len(images), 1, 1, 1, generator=random, device=self.device) < 0.5
        return torch.where(mirrored, images.flip(3), images).contiguous(memory_format=torch.channels_last)

    def _dealt(self, purpose: str, step: int) -> Tensor:
        turn, position = divmod(step, len(self.frozen) + len(self.live))
        if position >= len(self.frozen):
            member = position - len(self.frozen)
            generator, average = self.live[member]
            images = self.draw(generator, f"{purpose}/live", member, step)[0]
            if average is None:
                return images
            half, earlier = self.batch_size // 2, self.draw(average, f"{purpose}/average", member, step)[0]
            return torch.cat([images[:half], earlier[half:]]).contiguous(memory_format=torch.channels_last)
        if purpose not in self._rounds or self._rounds[purpose][0] != turn:
            self._rounds[purpose] = turn, self._mixed(purpose, turn)
        return self._rounds[purpose][1][position * self.batch_size : (position + 1) * self.batch_size]

    @torch.no_grad()
    def sample(self) -> list[tuple[Tensor, Tensor | None]]:
        """A batch of each member, frozen ones first, and its labels; the same at every call."""
        members = self.frozen + [generator for generator, _ in self.live]
        return [self.draw(item, "sample", index, 0) for index, item in enumerate(members)]

    def _mixed(self, purpose: str, turn: int) -> Tensor:
        images = torch.cat([self.draw(item, purpose, index, turn)[0] for index, item in enumerate(self.frozen)])
        random = random_source(self.seed, "mix", purpose, turn, device=self.device)
        order = torch.randperm(len(images), generator=random, device=self.device)
        return images[order].contiguous(memory_format=torch.channels_last)
