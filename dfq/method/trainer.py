"""Data-free training: generators warm up, then generators and students alternate. Source: arXiv 2005.04136.

for each generator:  warm-up steps on L_psi; frozen snapshots join the pool
calibrate the students' ranges on images of the pool
for each step:
    each live generator:  minimise  alpha L_psi - adversary * sum over students of D(teacher, student)
    each student:         minimise  D(teacher, student) on fresh images of one generator of the pool
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dfq.config import GeneratorConfig, QuantConfig, Recipe
from dfq.method.bn_stats import BnStatistics
from dfq.method.generator import Generator
from dfq.method.losses import batch_negentropy, distillation, instance_entropy, label_cross_entropy
from dfq.method.pool import ImagePool
from dfq.method.teacher import freeze, teacher_graph
from dfq.network import Network, capture
from dfq.network.classifier import check_classifier, check_learns, check_teacher, check_weights
from dfq.quant import learn_ranges, range_parameters, set_adapting
from dfq.running.device import autocast
from dfq.running.execution import Execution
from dfq.running.optimizers import adam, cosine, load_optimizer, set_learning_rate, sgd
from dfq.running.seeds import seeded_initialisation


@dataclass
class Source:
    """A generator that is being trained, its optimizer, and where its random numbers come from."""

    config: GeneratorConfig
    generator: Generator
    optimizer: torch.optim.Optimizer
    index: int


class DataFreeTraining:
    """The task that `dfq.running.loop.run_loop` drives.

    Args:
        teacher: float classifier with batch norms; is frozen.
        students: the first is the product; fake-quantized (`prepare`) with `quant`, or float without.
        recipe: how images are made and how students learn.
        quant: the students' config; None for float students.
        input_shape, num_classes: of the teacher.
        steps: student steps.
        seed: of everything random.
        execution: who runs the steps, as they are or as CUDA graphs; None: as they are.
        network: the teacher, captured on its device; None: it is captured here.

    Raises:
        ValueError: a teacher without batch norms, or with other outputs than `[N, num_classes]`.
    """

    def __init__(
        self,
        teacher: nn.Module,
        students: list[nn.Module],
        recipe: Recipe,
        *,
        quant: QuantConfig | None,
        input_shape: tuple[int, int, int],
        num_classes: int,
        steps: int,
        seed: int,
        device: torch.device,
        precision: str,
        execution: Execution | None = None,
        network: Network | None = None,
    ) -> None:
        owner, name = ("quantize", "model") if quant else ("distill", "teacher")
        check_weights(teacher, owner=owner, name=name)
        self.teacher = freeze(teacher.to(device))
        self.recipe, self.quant, self.steps, self.seed = recipe, quant, steps, seed
        self.input_shape, self.num_classes, self.device, self.precision = input_shape, num_classes, device, precision
        self.execution = execution or Execution("off", device)
        self.students = [student.requires_grad_(True).to(device) for student in students]
        for student in self.students:
            student.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._check_models(owner, name, network)
        self.sources = [self._source(index, config) for index, config in enumerate(recipe.generators)]
        self.pool = ImagePool(
            self.execution, batch_size=recipe.batch_size, seed=seed, device=device, precision=precision
        )
        self.pool.live = [source.generator for source in self.sources if source.config.live]
        self.snapshot_owners: list[int] = []
        self.calibrated: dict[str, Tensor] = {}
        self.optimizers: list[tuple[torch.optim.Optimizer, ...]] = [] if quant else self._student_optimizers()
        self.warm_up_steps = recipe.warm_up * len(self.sources)
        self.calibration_steps = 1 if quant else 0
        self.total_steps = self.warm_up_steps + self.calibration_steps + steps

    # --- the algorithm ------------------------------------------------------------------------------------------

    def step(self, index: int) -> Mapping[str, Tensor]:
        """Step `index` of all phases, its randomness a function of seed and index; gives the loss terms by name."""
        with seeded_initialisation(self.seed, "step", index):  # for a dropout in a float student
            return self._step(index)

    def _step(self, index: int) -> Mapping[str, Tensor]:
        if index < self.warm_up_steps:
            source, local = divmod(index, self.recipe.warm_up)
            return self.warm_up_step(self.sources[source], local)
        if index < self.warm_up_steps + self.calibration_steps:
            return self._calibrate()
        return self._alternate(index - self.warm_up_steps - self.calibration_steps)

    def warm_up_step(self, source: Source, step: int) -> Mapping[str, Tensor]:
        metrics = self.generator_step(source, "warm-up", step, students=[])
        if step + 1 in self._snapshot_steps(source):
            self.add_snapshot(source)
        return metrics

    def _alternate(self, step: int) -> Mapping[str, Tensor]:
        metrics: dict[str, Tensor] = {}
        if step % self.recipe.student_steps_per_generator_step == 0:
            for source in self.sources:
                if source.config.live:
                    metrics |= self.generator_step(source, "live", step, students=self.students)
        for index in range(len(self.students)):
            metrics |= self.student_step(index, step)
        return metrics

    def generator_step(self, source: Source, phase: str, step: int, students: list[nn.Module]) -> Mapping[str, Tensor]:
        """One step on `alpha L_psi - adversary * sum D`; without students on `L_psi` alone."""
        total = self.recipe.warm_up if phase == "warm-up" else self.steps
        set_learning_rate(source.optimizer, 1.0 if phase == "warm-up" and source.config.live else cosine(step, total))
        z, labels = self.pool.noise(source.generator, phase, source.index, step)
        update = partial(self._update_generator, source, students)
        return self.execution.step((phase, f"generator {source.index + 1}"), update, z, labels)

    def _update_generator(
        self, source: Source, students: list[nn.Module], z: Tensor, labels: Tensor | None
    ) -> Mapping[str, Tensor]:
        recipe = self.recipe
        images = self.pool.images(source.generator, z, labels)
        with self.bn_statistics as statistics, autocast(self.device, self.precision):
            teacher_logits = self.execution.call(self.fused_teacher, images)
            terms = {"bn": recipe.bn * statistics.loss()}
        if labels is None:
            terms["instance"] = recipe.instance * instance_entropy(teacher_logits)
            terms["batch"] = recipe.batch * batch_negentropy(teacher_logits)
        else:
            terms["label"] = recipe.label * label_cross_entropy(teacher_logits, labels)
        if students and recipe.adversary > 0:
            disagreement = [
                distillation(teacher_logits, self._forward(student, images, learning=False)) for student in students
            ]
            terms["adversary"] = -recipe.adversary * torch.stack(disagreement).sum()
        source.optimizer.zero_grad(set_to_none=True)
        torch.stack(list(terms.values())).sum().backward(inputs=list(source.generator.parameters()))
        nn.utils.clip_grad_norm_(source.generator.parameters(), recipe.clip)
        source.optimizer.step()
        return {f"generator{source.index}/{name}": term.detach() for name, term in terms.items()}

    def student_step(self, index: int, step: int) -> Mapping[str, Tensor]:
        """One step on `D`, on fresh images, with no graph through the generator."""
        for optimizer in self.optimizers[index]:
            set_learning_rate(optimizer, cosine(step, self.steps))
        images = self.pool.batch(f"student{index}", step)
        return self.execution.step(f"student {index + 1}", partial(self._update_student, index), images)

    def _update_student(self, index: int, images: Tensor) -> Mapping[str, Tensor]:
        student = self.students[index]
        with torch.no_grad(), autocast(self.device, self.precision):
            teacher_logits = self.execution.call(self.fused_teacher, images)
        set_adapting(student, True)
        loss = self.distance(teacher_logits, self._forward(student, images, learning=True))
        set_adapting(student, False)
        student.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), self.recipe.clip)
        for optimizer in self.optimizers[index]:
            optimizer.step()
        return {f"student{index}/distillation": loss.detach()}

    def distance(self, teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
        """What a student minimises: `D`."""
        return distillation(teacher_logits, student_logits)

    def _calibrate(self) -> Mapping[str, Tensor]:
        """Sets every range on images of the pool, keeps the calibrated state (DF-Q), starts the learned ranges."""
        assert self.quant is not None
        for student in self.students:
            student.train()
            set_adapting(student, True, batch_norms=False)
            with torch.no_grad(), autocast(self.device, self.precision):
                for batch in range(self.recipe.calibration_batches):
                    student(self.pool.batch("calibrate", batch))
            set_adapting(student, False)
        self.calibrated = {name: value.clone() for name, value in self.students[0].state_dict().items()}
        for student in self.students:
            learn_ranges(student, self.quant)
        self.optimizers = self._student_optimizers()
        return {}

    # --- parts --------------------------------------------------------------------------------------------------

    def phase(self, index: int) -> str:
        """What step `index` is part of: `generator 2 of 3`, `calibrate` or `student`."""
        if index < self.warm_up_steps:
            return f"generator {index // self.recipe.warm_up + 1} of {len(self.sources)}"
        return "calibrate" if index < self.warm_up_steps + self.calibration_steps else "student"

    def _snapshot_steps(self, source: Source) -> list[int]:
        return sorted({max(1, round(part * self.recipe.warm_up)) for part in source.config.snapshots})

    def pool_names(self) -> list[str]:
        """Which generator each member of the pool is, after which step of its warm-up it was frozen."""
        names = []
        for position, owner in enumerate(self.snapshot_owners):
            step = self._snapshot_steps(self.sources[owner])[self.snapshot_owners[:position].count(owner)]
            names.append(f"generator {owner + 1}, step {step}")
        return names + [f"generator {source.index + 1}, live" for source in self.sources if source.config.live]

    def add_snapshot(self, source: Source) -> None:
        """A copy of the generator as it is now joins the pool, frozen."""
        self.pool.frozen.append(copy.deepcopy(source.generator).requires_grad_(False))
        self.snapshot_owners.append(source.index)

    def _forward(self, student: nn.Module, images: Tensor, *, learning: bool) -> Tensor:
        """A float student that is not learning is in evaluation: its batch norms stay as they are."""
        student.train(learning or self.quant is not None)
        with autocast(self.device, self.precision):
            return self.execution.call(student, images, fullgraph=self.quant is not None)

    def _source(self, index: int, config: GeneratorConfig) -> Source:
        recipe = self.recipe
        with seeded_initialisation(self.seed, "generator", index):
            generator = Generator(
                self.input_shape, noise=recipe.noise, width=recipe.width,
                num_classes=self.num_classes if config.conditional else 0,
            )  # fmt: skip
        generator = generator.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimizer = adam(generator.parameters(), recipe.generator_learning_rate, betas=(0.5, 0.999))
        return Source(config, generator, optimizer, index)

    def _check_models(self, owner: str, name: str, network: Network | None) -> None:
        sizes = {"input_shape": self.input_shape, "num_classes": self.num_classes, "device": self.device}
        check_teacher(self.teacher, **sizes, owner=owner, name=name)  # type: ignore[arg-type]
        network = network or capture(self.teacher, self.input_shape, owner)
        self.fused_teacher = teacher_graph(network, torch.bfloat16 if self.precision == "bf16" else None)
        self.bn_statistics = BnStatistics(self.fused_teacher)
        images = torch.randn(4, *self.input_shape, generator=torch.Generator().manual_seed(0)).to(self.device)
        with torch.no_grad(), self.bn_statistics as statistics, autocast(self.device, self.precision):
            self.fused_teacher(images)
            statistics.loss()  # its kernels are there
        for index, student in enumerate(self.students):
            check_classifier(student, **sizes, owner=owner, name=f"students[{index}]")  # type: ignore[arg-type]
            if not self.quant:
                check_learns(student, **sizes, owner=owner, name=f"students[{index}]")  # type: ignore[arg-type]

    def _student_optimizers(self) -> list[tuple[torch.optim.Optimizer, ...]]:
        recipe = self.recipe
        optimizers: list[tuple[torch.optim.Optimizer, ...]] = []
        for student in self.students:
            ranges = range_parameters(student)
            learned = {id(parameter) for parameter in ranges}
            weights = [parameter for parameter in student.parameters() if id(parameter) not in learned]
            slow = sgd(weights, recipe.student_learning_rate, weight_decay=recipe.weight_decay)
            optimizers.append((slow, adam(ranges, recipe.range_learning_rate)) if ranges else (slow,))
        return optimizers

    # --- resume -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {
            "generators": [source.generator.state_dict() for source in self.sources],
            "generator_optimizers": [source.optimizer.state_dict() for source in self.sources],
            "snapshot_owners": self.snapshot_owners,
            "snapshots": [generator.state_dict() for generator in self.pool.frozen],
            "calibrated": self.calibrated,
            "students": [student.state_dict() for student in self.students],
            "optimizers": [[optimizer.state_dict() for optimizer in row] for row in self.optimizers],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.execution.reset()
        for source, weights, optimizer in zip(
            self.sources, state["generators"], state["generator_optimizers"], strict=True
        ):
            source.generator.load_state_dict(weights)
            load_optimizer(source.optimizer, optimizer)
        self.pool.frozen, self.snapshot_owners = [], []
        for owner, weights in zip(state["snapshot_owners"], state["snapshots"], strict=True):
            self.add_snapshot(self.sources[owner])
            self.pool.frozen[-1].load_state_dict(weights)
        self.calibrated = {name: value.to(self.device) for name, value in state["calibrated"].items()}
        if self.calibrated:
            self.students[0].load_state_dict(self.calibrated)  # it fits, or the checkpoint is refused now
        for student, weights in zip(self.students, state["students"], strict=True):
            student.load_state_dict(weights)
        if self.quant and state["optimizers"]:
            self.optimizers = self._student_optimizers()  # of the students' phase: learned ranges are parameters
        for row, saved in zip(self.optimizers, state["optimizers"], strict=True):
            for optimizer, values in zip(row, saved, strict=True):
                load_optimizer(optimizer, values)
