"""Trains a float classifier on real images: the teacher, and the baselines that may see data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dfq.config import TeachConfig
from dfq.data.images import Batches, Images
from dfq.network.outputs import check_outputs
from dfq.running.device import autocast
from dfq.running.optimizers import load_optimizer, one_cycle, set_learning_rate, sgd
from dfq.running.seeds import seeded_initialisation


class TeacherTraining:
    """SGD with Nesterov momentum and a one-cycle schedule on the cross-entropy of augmented images."""

    def __init__(
        self, model: nn.Module, images: Images, config: TeachConfig, *, seed: int, device: torch.device, precision: str
    ) -> None:
        self.model = model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        shapes = [(images.num_classes,)]
        check_outputs(self.model, images.input_shape, shapes, device=device, owner="teach", name="model")
        self.batches = Batches(images, config.batch_size, seed, augmented=True)
        self.total_steps = config.epochs * self.batches.steps_per_epoch
        self.config, self.seed, self.device, self.precision = config, seed, device, precision
        self.optimizer = sgd(self.model.parameters(), config.learning_rate, weight_decay=config.weight_decay)

    def phase(self, index: int) -> str:
        return f"epoch {index // self.batches.steps_per_epoch + 1}"

    def step(self, index: int) -> Mapping[str, Tensor]:
        set_learning_rate(self.optimizer, one_cycle(index, self.total_steps))
        images, labels = self.batches[index]
        images = images.to(self.device, memory_format=torch.channels_last)
        labels = labels.to(self.device)
        self.model.train()
        with seeded_initialisation(self.seed, "step", index), autocast(self.device, self.precision):
            loss = F.cross_entropy(self.model(images).float(), labels)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return {"cross_entropy": loss.detach()}

    def state_dict(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        load_optimizer(self.optimizer, state["optimizer"])
