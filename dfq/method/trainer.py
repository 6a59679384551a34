"""Data-free training: generators warm up, then generators and students alternate. Source: arXiv 2005.04136.

ranges, scales and corrections from what batch norms remember (rung "analytic")
for each generator:  warm-up steps on L_psi; frozen snapshots join the pool
choose the bits of every layer's weights, where there is a budget
set the students' ranges on images of the pool (rung "calibrated")
fit them to the teacher layer by layer (rung "reconstructed")
for each step (rung "distilled"):
    each live generator:  minimise  alpha L_psi - adversary * sum over students of D(teacher, student)
    each student:         minimise  D(teacher, student) + attention * L(teacher's maps, student's)
                          on fresh images of one generator of the pool
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dfq.config import BEGINNINGS, QuantConfig, Recipe
from dfq.errors import check
from dfq.method.analytic import analytic_network
from dfq.method.attention import attention_distance, compares_maps, feature_maps
from dfq.method.bn_stats import BnStatistics
from dfq.method.budget import Budget, choose_bits
from dfq.method.losses import label_cross_entropy
from dfq.method.noise import image_moments
from dfq.method.objective import Objective
from dfq.method.pool import ImagePool
from dfq.method.reconstruct import Reconstruction, images_in_memory
from dfq.method.resume import restore, state_of
from dfq.method.source import Source, make_source
from dfq.method.student_optimizers import Optimizers, student_optimizers
from dfq.method.teacher import freeze, teacher_graph
from dfq.network import Network, capture
from dfq.network.outputs import check_learns, check_outputs, check_weights
from dfq.quant import learn_ranges, quantizers, set_adapting
from dfq.quant.quantizers import forget_ranges, weight_layers
from dfq.running import ranks
from dfq.running.device import autocast
from dfq.running.execution import Execution
from dfq.running.optimizers import cosine, set_learning_rate
from dfq.running.seeds import seeded_initialisation

PACE = 1e-3  # of ranges that batch norms have set: generated images have other extremes than real ones


@dataclass(frozen=True)
class Phase:
    """Steps of one kind; `step` takes their number within the phase and gives the loss terms by name."""

    name: str
    steps: int
    step: Callable[[int], Mapping[str, Tensor]]


class DataFreeTraining:
    """The task that `dfq.running.loop.run_loop` drives.

    Args:
        teacher: float network with batch norms; is frozen.
        students: the first is the product; fake-quantized (`prepare`) with `quant`, or float without.
        recipe: how images are made and how students learn.
        quant: the students' config; None for float students.
        input_shape: of the teacher's images.
        objective: what its outputs mean.
        images: real ones that students see beside generated ones, `[N, C, H, W]`; None: there are none.
        bounds: what black and white are to the network, `[C]` each; None: not known.
        budget: of the students' weights; None: they have the bits that they came with.
        steps: student steps.
        seed: of everything random.
        execution: who runs the steps, as they are or as CUDA graphs; None: as they are.
        network: the teacher, captured on its device; None: it is captured here.

    Raises:
        ValueError: a teacher without batch norms; networks with other outputs than the objective's; generators that
            are asked for labels where there are none.
    """

    def __init__(
        self,
        teacher: nn.Module,
        students: list[nn.Module],
        recipe: Recipe,
        *,
        quant: QuantConfig | None,
        input_shape: tuple[int, int, int],
        objective: Objective,
        steps: int,
        seed: int,
        device: torch.device,
        precision: str,
        images: Tensor | None = None,
        bounds: tuple[Tensor, Tensor] | None = None,
        budget: Budget | None = None,
        execution: Execution | None = None,
        network: Network | None = None,
    ) -> None:
        owner, name = ("quantize", "model") if quant else ("distill", "teacher")
        check_weights(teacher, owner=owner, name=name)
        self.teacher = freeze(teacher.to(device))
        self.recipe, self.quant, self.steps, self.seed = recipe, quant, steps, seed
        self.input_shape, self.objective, self.device, self.precision = input_shape, objective, device, precision
        self.execution = execution or Execution("off", device)
        self.students = [student.requires_grad_(True).to(device) for student in students]
        for student in self.students:
            student.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._check_models(owner, name, network)
        settings = {"bounds": bounds, "labels": objective.num_classes, "seed": seed, "device": device}
        self.sources = [
            make_source(index, config, recipe, input_shape, self.moments, **settings)  # type: ignore[arg-type]
            for index, config in enumerate(recipe.generators)
        ]
        self.pool = ImagePool(
            self.execution, batch_size=recipe.batch_size, seed=seed, device=device, precision=precision, real=images,
            mirrored=recipe.mirrored,
        )  # fmt: skip
        self.pool.live = [(source.generator, source.average) for source in self.sources if source.config.live]
        self.snapshot_owners: list[int] = []
        self.bounds = bounds
        self.budget, self.bits = budget, dict[str, int]()  # of the layers that it is about
        self.rungs: dict[str, dict[str, Tensor]] = {}  # the product's state after each rung but the last
        self.optimizers: list[Optimizers] = [] if quant else student_optimizers(self.students, recipe)
        begun = [rung for rung in recipe.rungs if rung in BEGINNINGS]
        self.pace = PACE if begun[-1] == "analytic" else None
        self.phases = self._phases()
        self.total_steps = sum(phase.steps for phase in self.phases)

    # --- the algorithm ------------------------------------------------------------------------------------------

    def _phases(self) -> list[Phase]:
        rungs, count = self.recipe.rungs if self.quant else ("distilled",), len(self.sources)
        phases = [Phase("analytic", 1, self._analytic)] if "analytic" in rungs and self.budget is None else []
        for number, source in enumerate(self.sources, 1):
            phases.append(
                Phase(f"generator {number} of {count}", self.recipe.warm_up, partial(self.warm_up_step, source))
            )
        if self.budget is not None:
            phases.append(Phase("bits", 1, self._choose_bits))
        if "calibrated" in rungs:
            phases.append(Phase("calibrate", 1, self._calibrate))
        self.exact: list[nn.Module] = []
        self.reconstructions: list[Reconstruction] = []
        if "reconstructed" in rungs:
            self.exact = [copy.deepcopy(student) for student in self.students]
            phases.append(Phase("reconstruct", len(weight_layers(self.students[0])), self._reconstruct))
        return [*phases, Phase("student", self.steps, self._alternate)] if "distilled" in rungs else phases

    def first_step(self, name: str) -> int:
        """How many steps come before those of a phase."""
        names = [phase.name for phase in self.phases]
        return sum(phase.steps for phase in self.phases[: names.index(name)])

    def phase(self, index: int) -> str:
        """What step `index` is part of: `generator 2 of 3`, `calibrate`, `student`, ..."""
        return self._find(index)[0].name

    def _find(self, index: int) -> tuple[Phase, int]:
        for phase in self.phases:
            if index < phase.steps:
                return phase, index
            index -= phase.steps
        raise IndexError(index)

    def step(self, index: int) -> Mapping[str, Tensor]:
        """Step `index` of all phases, its randomness a function of seed and index; gives the loss terms by name."""
        phase, local = self._find(index)
        with seeded_initialisation(self.seed, "step", index):  # for a dropout in a float student
            return ranks.averaged(phase.step(local))

    def warm_up_step(self, source: Source, step: int) -> Mapping[str, Tensor]:
        metrics = self.generator_step(source, "warm-up", step, students=[])
        if step + 1 in source.snapshot_steps(self.recipe.warm_up):
            self.add_snapshot(source)
        if step + 1 == self.recipe.warm_up:
            source.start_average()
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
        images = ranks.share(self.pool.images(source.generator, z, labels))
        with self.bn_statistics as statistics, autocast(self.device, self.precision):
            teacher_logits = self.execution.call(self.fused_teacher, images)
            terms = {"bn": recipe.bn * statistics.loss()}
        if labels is None:
            entropies = self.objective.entropies(teacher_logits)
            terms |= {name: getattr(recipe, name) * value for name, value in entropies.items()}
        else:
            terms["label"] = recipe.label * label_cross_entropy(teacher_logits, ranks.share(labels))
        if students and recipe.adversary > 0:
            disagreement = [
                self.distance(teacher_logits, self._forward(student, images, learning=False)) for student in students
            ]
            terms["adversary"] = -recipe.adversary * torch.stack(disagreement).sum()
        source.optimizer.zero_grad(set_to_none=True)
        torch.stack(list(terms.values())).sum().backward(inputs=list(source.generator.parameters()))
        ranks.average_gradients(source.generator.parameters())
        nn.utils.clip_grad_norm_(source.generator.parameters(), recipe.clip)
        source.optimizer.step()
        if students:
            source.follow(recipe.momentum)
        return {f"generator{source.index}/{name}": term.detach() for name, term in terms.items()}

    def student_step(self, index: int, step: int) -> Mapping[str, Tensor]:
        """One step on `D + attention L`, on fresh images, with no graph through the generator."""
        for optimizer in self.optimizers[index]:
            set_learning_rate(optimizer, cosine(step, self.steps))
        images = ranks.share(self.pool.batch(f"student{index}", step))
        return self.execution.step(f"student {index + 1}", partial(self._update_student, index), images)

    def _update_student(self, index: int, images: Tensor) -> Mapping[str, Tensor]:
        student, attentive = self.students[index], self.attentive[index]
        teacher = self.teacher if attentive else self.fused_teacher
        with torch.no_grad(), autocast(self.device, self.precision), feature_maps(teacher, attentive) as wanted:
            teacher_logits = self.execution.call(teacher, images)
        set_adapting(student, True, pace=self.pace)
        with feature_maps(student, attentive) as maps:
            terms = {"distillation": self.distance(teacher_logits, self._forward(student, images, learning=True))}
        set_adapting(student, False)
        if attentive:
            terms["attention"] = self.recipe.attention * attention_distance(wanted, maps)
        student.zero_grad(set_to_none=True)
        torch.stack(list(terms.values())).sum().backward()
        ranks.average_gradients(student.parameters())
        nn.utils.clip_grad_norm_(student.parameters(), self.recipe.clip)
        for optimizer in self.optimizers[index]:
            optimizer.step()
        return {f"student{index}/{name}": term.detach() for name, term in terms.items()}

    def distance(self, wanted: Any, got: Any) -> Tensor:
        """`D`: what a student minimises and live generators maximise."""
        return self.objective.distance(self.recipe.distance, wanted, got)

    def _analytic(self, _: int) -> Mapping[str, Tensor]:
        """The network that needs no image."""
        with ranks.alone():  # the same noise in all processes
            for student in self.students:
                analytic_network(student, self.moments, self.bounds, seed=self.seed)  # type: ignore[arg-type]
        return self._climbed("analytic")

    def _climbed(self, rung: str) -> Mapping[str, Tensor]:
        """Keeps what a rung made, if another follows; before one that learns, step sizes become parameters."""
        later = self.recipe.rungs[self.recipe.rungs.index(rung) + 1 :]
        if later:
            self.rungs[rung] = _state(self.students[0])
        if rung in BEGINNINGS and later and later[0] not in BEGINNINGS:
            assert self.quant is not None
            for student in self.students:
                learn_ranges(student, self.quant)
            self.optimizers = student_optimizers(self.students, self.recipe)
        return {}

    def _choose_bits(self, _: int) -> Mapping[str, Tensor]:
        """By the sensitivity of every layer; then the rung that comes before the generators otherwise."""
        assert self.budget is not None
        product: Any = self.students[0]
        with ranks.alone():  # the same images in all processes
            bits = choose_bits(product, self.objective, partial(self.pool.batch, "bits"), self.budget)
        self.use_bits(bits)
        return self._analytic(0) if "analytic" in self.recipe.rungs else {}

    def use_bits(self, bits: Mapping[str, int]) -> None:
        """Other bits of weights in all students; before anything is learned."""
        self.bits = dict(bits)
        for student in self.students + self.exact:
            quantizers.use_bits(student, bits)

    def _calibrate(self, _: int) -> Mapping[str, Tensor]:
        """Sets every range on images of the pool, whatever it was (DF-Q)."""
        for student in self.students:
            forget_ranges(student)
            student.train()
            set_adapting(student, True, batch_norms=False)
            with torch.no_grad(), autocast(self.device, self.precision):
                for batch in range(self.recipe.calibration_batches):
                    student(ranks.share(self.pool.batch("calibrate", batch)))
            set_adapting(student, False)
        return self._climbed("calibrated")

    def _reconstruct(self, layer: int) -> Mapping[str, Tensor]:
        """Fits one layer of every student; the walk up to it is made anew after a resume."""
        fit, size = self.recipe.fit, self.recipe.batch_size
        if not self.reconstructions:
            first = self.pool.batch("reconstruct", 0)
            count = min(fit.images, images_in_memory(self.exact[0], first[:1]))  # type: ignore[arg-type]
            rest = [self.pool.batch("reconstruct", batch) for batch in range(1, -(-count // size))]
            batches = list(torch.cat([first, *rest])[:count].split(size))
            self.reconstructions = [
                Reconstruction(student, exact, batches, fit, self.seed)  # type: ignore[arg-type]
                for student, exact in zip(self.students, self.exact, strict=True)
            ]
        with autocast(self.device, self.precision):
            fitted = [reconstruction.step(layer) for reconstruction in self.reconstructions]
        if layer + 1 == self.reconstructions[0].steps:
            self.reconstructions = []  # the images' values need memory
            self._climbed("reconstructed")
        return {f"student{i}/{name}": value for i, terms in enumerate(fitted) for name, value in terms.items()}

    # --- parts --------------------------------------------------------------------------------------------------

    def pool_names(self) -> list[str]:
        """Which generator each member of the pool is, after which step of its warm-up it was frozen."""
        names = []
        for position, owner in enumerate(self.snapshot_owners):
            step = self.sources[owner].snapshot_steps(self.recipe.warm_up)[self.snapshot_owners[:position].count(owner)]
            names.append(f"generator {owner + 1}, step {step}")
        return names + [f"generator {source.index + 1}, live" for source in self.sources if source.config.live]

    def add_snapshot(self, source: Source) -> None:
        """A copy of the generator as it is now joins the pool, frozen."""
        self.pool.frozen.append(source.frozen_copy())
        self.snapshot_owners.append(source.index)

    def _forward(self, student: nn.Module, images: Tensor, *, learning: bool) -> Tensor:
        """A float student that is not learning is in evaluation: its batch norms stay as they are."""
        student.train(learning or self.quant is not None)
        with autocast(self.device, self.precision):
            return self.execution.call(student, images, fullgraph=self.quant is not None)

    def _check_models(self, owner: str, name: str, network: Network | None) -> None:
        asked = any(item.conditional for item in self.recipe.generators)
        labels = not asked or self.objective.num_classes is not None
        check(
            owner, "recipe", self.recipe.name, "one without conditional generators where images have no label", labels
        )
        shapes = self.objective.shapes
        check_outputs(self.teacher, self.input_shape, shapes, device=self.device, owner=owner, name=name)
        network = network or capture(self.teacher, self.input_shape, owner)
        self.fused_teacher = teacher_graph(network, torch.bfloat16 if self.precision == "bf16" else None)
        self.bn_statistics = BnStatistics(self.fused_teacher)
        self.moments = image_moments(teacher_graph(network), self.input_shape, self.device)
        images = torch.randn(4, *self.input_shape, generator=torch.Generator().manual_seed(0)).to(self.device)
        with torch.no_grad(), self.bn_statistics as statistics, autocast(self.device, self.precision):
            self.fused_teacher(images)
            statistics.loss()  # its kernels are there
        for index, student in enumerate(self.students):
            for test in (check_outputs,) if self.quant else (check_outputs, check_learns):
                test(student, self.input_shape, shapes, device=self.device, owner=owner, name=f"students[{index}]")
        self.attentive = [
            self.recipe.attention > 0 and compares_maps(self.teacher, student, images, f"{owner}: students[{index}]")
            for index, student in enumerate(self.students)
        ]

    # --- resume -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return state_of(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore(self, state)


def _state(student: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in student.state_dict().items()}
