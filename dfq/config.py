"""Settings as data: frozen dataclasses and named presets. The resolved config is written beside every run."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from dfq.errors import check

PRESETS = ("W8A8", "W4A8", "W4A4", "W3A3", "W2A4", "W2A2", "gdfq")
"""Named bit widths. Any `W<2-8>A<2-8>` works, and any of them after `gdfq-`; `gdfq` alone is `gdfq-W4A4`."""


@dataclass(frozen=True)
class LayerBits:
    """Bits of one layer's weights and of its input, 2 to 8 each."""

    weights: int
    activations: int

    def __post_init__(self) -> None:
        for name, value in (("weights", self.weights), ("activations", self.activations)):
            check("LayerBits", name, value, "in [2, 8]", type(value) is int and 2 <= value <= 8)


@dataclass(frozen=True)
class QuantConfig:
    """How a float model becomes a fake-quantized one.

    Args:
        bits: of the layers between the first and the last.
        first, last: bits of the edge layers.
        overrides: bits by layer name: that of the module or, of a functional call, of the module that makes it; they
            win over `first` and `last`.
        ranges: `minmax` (moving average) or `lsq` (learned step sizes, for fewer than 8 bits).
        weight_scheme: `symmetric` or `affine`, per output channel.
        activations: `all` (an integer network: image, every layer's input, every stream) or
            `after_relu` (the result of every activation function, once: ReLU, SiLU, ..., not PReLU; no integer
            network, but the literature's convention).
        residual_bits: of streams: values that anything in integers but a layer with weights, a table or a maximum
            computes with.
        averaging_constant: weight of a batch in a moving range.
        batch_norm: `frozen` (the teacher's statistics) or `train`.
    """

    bits: LayerBits = LayerBits(4, 4)
    first: LayerBits = LayerBits(8, 8)
    last: LayerBits = LayerBits(8, 8)
    overrides: Mapping[str, LayerBits] = field(default_factory=dict)
    ranges: str = "minmax"
    weight_scheme: str = "symmetric"
    activations: str = "all"
    residual_bits: int = 8
    averaging_constant: float = 0.1
    batch_norm: str = "frozen"

    def __post_init__(self) -> None:
        for name, allowed in (
            ("ranges", ("minmax", "lsq")),
            ("weight_scheme", ("symmetric", "affine")),
            ("activations", ("all", "after_relu")),
            ("batch_norm", ("frozen", "train")),
        ):
            value = getattr(self, name)
            check("QuantConfig", name, value, f"one of {', '.join(allowed)}", value in allowed)
        layers = all(
            isinstance(item, LayerBits) for item in (self.bits, self.first, self.last, *self.overrides.values())
        )
        check("QuantConfig", "overrides", self.overrides, "LayerBits, as bits, first and last", layers)
        check("QuantConfig", "residual_bits", self.residual_bits, "in [2, 8]", 2 <= self.residual_bits <= 8)
        check(
            "QuantConfig", "averaging_constant", self.averaging_constant, "in (0, 1]", 0 < self.averaging_constant <= 1
        )

    @property
    def why_no_integers(self) -> str | None:
        """The setting that no integer network has; None: there is none."""
        if self.activations != "all":
            return f"activations={self.activations!r} leaves values that are not quantized"
        if self.weight_scheme != "symmetric":
            return f"weight_scheme={self.weight_scheme!r} gives weights zero points"
        return None

    @property
    def integers(self) -> bool:
        """Whether a network of this config can be one of integers."""
        return self.why_no_integers is None


def quant_config(
    preset: str,
    *,
    ranges: str = "minmax",
    overrides: Mapping[str, LayerBits] | None = None,
    owner: str = "quant_config",
) -> QuantConfig:
    """The config of a preset.

    `W4A4`: 4-bit weights and activations between 8-bit edge layers. `gdfq-W4A4`: the convention of GDFQ and its
    descendants: edge layers at these bits too, affine weights, only the results of activation functions.

    Args:
        preset: one of `PRESETS`, or any `[gdfq-]W<2-8>A<2-8>`.
        ranges: `minmax` (as in these papers) or `lsq`.
        overrides: bits by layer name.
        owner: who is named in errors.

    Raises:
        ValueError: an unknown preset, or bits out of range.
    """
    name = "gdfq-W4A4" if preset == "gdfq" else preset
    match = re.fullmatch(r"(?:(gdfq)-)?W(\d+)A(\d+)", name) if isinstance(name, str) else None
    check(owner, "preset", preset, f"one of {', '.join(PRESETS)} or [gdfq-]W<bits>A<bits>", match is not None)
    assert match is not None
    bits = LayerBits(int(match[2]), int(match[3]))
    if match[1]:
        return QuantConfig(
            bits, bits, bits, dict(overrides or {}), ranges, weight_scheme="affine", activations="after_relu"
        )
    return QuantConfig(bits, overrides=dict(overrides or {}), ranges=ranges)


@dataclass(frozen=True)
class TeachConfig:
    """How a teacher is trained: SGD Nesterov 0.9, one-cycle, cross-entropy, shifted and mirrored images."""

    epochs: int = 12
    batch_size: int = 128
    learning_rate: float = 0.2
    weight_decay: float = 5e-4

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("batch_size", 2)):
            value = getattr(self, name)
            check("teach", name, value, f"an integer of at least {least}", type(value) is int and value >= least)
        check("teach", "learning_rate", self.learning_rate, "> 0", self.learning_rate > 0)
        check("teach", "weight_decay", self.weight_decay, ">= 0", self.weight_decay >= 0)


@dataclass(frozen=True)
class GeneratorConfig:
    """One generator of the pool.

    Args:
        conditional: it is asked for a label, and its term is the teacher's cross-entropy to it instead of entropies.
        live: it goes on training against the students; else it is frozen after its warm-up.
        snapshots: warm-up steps, in fractions of the warm-up, at which a frozen copy joins the pool; a live generator
            is in the pool itself, beside its snapshots.
    """

    conditional: bool = False
    live: bool = False
    snapshots: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        in_range = all(0 < part <= 1 for part in self.snapshots)
        check("GeneratorConfig", "snapshots", self.snapshots, "fractions in (0, 1]", in_range)
        once = len(set(self.snapshots)) == len(self.snapshots)
        check("GeneratorConfig", "snapshots", self.snapshots, "different from each other", once)


@dataclass(frozen=True)
class LayerFit:
    """How one layer is fitted to its float self: Adam, cosine.

    Args:
        images: of the pool, that all layers are fitted on; fewer where their values would take over 4 GiB.
        steps, batch_size: of one layer.
        learning_rate: of weights, biases and batch norms.
        range_learning_rate: of the logarithms of step sizes.
    """

    images: int = 1024
    steps: int = 100
    batch_size: int = 64
    learning_rate: float = 5e-4
    range_learning_rate: float = 5e-2

    def __post_init__(self) -> None:
        for name in ("images", "steps", "batch_size"):
            value = getattr(self, name)
            check("LayerFit", name, value, "an integer of at least 1", type(value) is int and value >= 1)
        for name in ("learning_rate", "range_learning_rate"):
            check("LayerFit", name, getattr(self, name), "> 0", getattr(self, name) > 0)


RUNGS = ("analytic", "calibrated", "reconstructed", "distilled")
"""What a quantized student becomes, each better and dearer than the one before."""
BEGINNINGS = ("analytic", "calibrated")
"""Those of them that set ranges; the others learn from there."""
DISTANCES = ("kl", "l1")


@dataclass(frozen=True)
class Recipe:
    """How images are made and how the student learns from them: data, not branches.

    Args:
        generators: the pool; each has its own seed. None, where the only rung is `analytic` or images are real.
        steps: student steps, where nobody says another number.
        rungs: of `RUNGS`, those that a quantized student climbs, in this order, each from where the one before it
            ended. A float student is distilled.
        fit: of the rung `reconstructed`.
        distance: between teacher and student, which the student minimises and live generators maximise: `kl` of the
            classes, or `l1` of the logits.
        attention: weight of the distance between where teacher and student look (`dfq.method.attention`), which
            students minimise.
        warm_up: steps of each generator alone, on its own terms.
        bn, instance, batch, label: weights of the generator's terms.
        adversary: weight of the students' disagreement, which live generators maximise.
        student_steps_per_generator_step: ratio of the alternation.
        momentum: of the moving average of a live generator's weights, per generator step, which makes half of its
            images; 0: there is none.
        mirrored: half of the generated images that students see are mirrored.
        students: how many students live generators disagree with; the first is the product.
        ranges: `minmax` or `lsq`.
        calibration_batches: batches that set the first ranges.
        batch_size, noise, width: images per step; length of the noise; channels of a generator's first map.
        generator_learning_rate: Adam (0.5, 0.999), cosine.
        student_learning_rate, weight_decay, clip: SGD Nesterov 0.9, cosine; clip of the gradient's norm.
        range_learning_rate: Adam on logarithms of step sizes, cosine.
    """

    name: str
    generators: tuple[GeneratorConfig, ...]
    warm_up: int
    steps: int = 200
    rungs: tuple[str, ...] = ("analytic", "distilled")
    fit: LayerFit = LayerFit()
    distance: str = "kl"
    attention: float = 0.0
    bn: float = 4.0
    instance: float = 1.0
    batch: float = 1.0
    label: float = 1.0
    adversary: float = 1.0
    student_steps_per_generator_step: int = 1
    momentum: float = 0.0
    mirrored: bool = False
    students: int = 1
    ranges: str = "minmax"
    calibration_batches: int = 9
    batch_size: int = 128
    noise: int = 128
    width: int = 128
    generator_learning_rate: float = 1e-3
    student_learning_rate: float = 1e-2
    weight_decay: float = 1e-4
    clip: float = 1.0
    range_learning_rate: float = 3e-3

    def __post_init__(self) -> None:
        positive = ("warm_up", "steps", "student_steps_per_generator_step", "students", "calibration_batches", "noise",
                    "clip", "generator_learning_rate", "student_learning_rate", "range_learning_rate")  # fmt: skip
        for name in positive:
            check("Recipe", name, getattr(self, name), "> 0", getattr(self, name) > 0)
        counts = ("warm_up", "steps", "student_steps_per_generator_step", "students", "calibration_batches",
                  "batch_size", "noise", "width")  # fmt: skip
        for name in counts:
            check("Recipe", name, getattr(self, name), "an integer", type(getattr(self, name)) is int)
        for name in ("bn", "instance", "batch", "label", "adversary", "attention", "weight_decay"):
            check("Recipe", name, getattr(self, name), ">= 0", getattr(self, name) >= 0)
        check("Recipe", "momentum", self.momentum, "in [0, 1)", 0 <= self.momentum < 1)
        check("Recipe", "batch_size", self.batch_size, "at least 2", self.batch_size >= 2)
        check("Recipe", "distance", self.distance, f"one of {', '.join(DISTANCES)}", self.distance in DISTANCES)
        ordered = bool(self.rungs) and self.rungs == tuple(rung for rung in RUNGS if rung in self.rungs)
        check("Recipe", "rungs", self.rungs, f"some of {', '.join(RUNGS)}, in this order", ordered)
        check("Recipe", "rungs", self.rungs, "with analytic or calibrated first", self.rungs[0] in BEGINNINGS)
        in_pool = any(item.live or item.snapshots for item in self.generators) or not self.generators
        check("Recipe", "generators", self.generators, "none, or at least one that is live or has a snapshot", in_pool)


SNAPSHOTS = GeneratorConfig(snapshots=(0.25, 0.5, 1.0))
DEFAULT = Recipe(
    "default", (SNAPSHOTS, SNAPSHOTS, GeneratorConfig(conditional=True, snapshots=(0.25, 0.5, 1.0))), warm_up=150,
    ranges="lsq", generator_learning_rate=3e-3, student_learning_rate=1e-2, range_learning_rate=1e-2,
)  # fmt: skip

RECIPES: dict[str, Recipe] = {
    # the published minimax: one live generator, one student, min/max ranges of generated images
    "paper": Recipe(
        "paper",
        (GeneratorConfig(live=True, snapshots=()),),
        warm_up=50,
        rungs=("calibrated", "distilled"),
        student_learning_rate=5e-3,
    ),
    # the best measured: from the analytic network on, frozen snapshots of several generators, learned step sizes
    "default": DEFAULT,
    # no generator and no step: ranges from what batch norms remember
    "analytic": Recipe("analytic", (), warm_up=1, rungs=("analytic",)),
    # ranges of real images alone
    "calibrate": Recipe("calibrate", (), warm_up=1, rungs=("analytic", "calibrated")),
    # layer by layer on a thousand images
    "reconstruct": replace(DEFAULT, name="reconstruct", rungs=("analytic", "reconstructed")),
    # the same of few images, for networks of large ones on a CPU
    "few": replace(
        DEFAULT,
        name="few",
        generators=(SNAPSHOTS,),
        batch_size=16,
        rungs=("analytic", "reconstructed"),
        fit=LayerFit(images=256, batch_size=16),
    ),
    # float students from nothing: a live adversary, the logits themselves, where the teacher looks; the average of the
    # generator's weights keeps images of before in sight. Source: K. Do et al., Momentum Adversarial Distillation,
    # NeurIPS 2022
    "distill": Recipe(
        "distill",
        (GeneratorConfig(live=True, snapshots=()),),
        warm_up=150,
        steps=6_000,
        distance="l1",
        attention=5.0,
        student_steps_per_generator_step=5,
        momentum=0.95,
        mirrored=True,
        student_learning_rate=0.1,
        weight_decay=5e-4,
        clip=5.0,
    ),
}
LADDER = ("default", "reconstruct", "few", "analytic")
"""Recipes for quantized networks, the best and dearest first: what a limit of time chooses from."""
EFFORTS = {"instant": "analytic", "quick": "reconstruct", "full": "default"}
"""How much is done for a quantized network, from seconds to minutes, and the recipe that does it."""


def recipe_named(name: str, owner: str = "recipe_named") -> Recipe:
    """A recipe of `RECIPES`; owner: who is named in errors.

    Raises:
        ValueError: an unknown name.
    """
    check(owner, "recipe", name, f"one of {', '.join(RECIPES)}", name in RECIPES)
    return RECIPES[name]


def to_json(value: Any) -> Any:
    """A config as JSON values, dataclasses as dicts."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: to_json(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    return value


def quant_config_from_json(data: Mapping[str, Any]) -> QuantConfig:
    """The inverse of `to_json` for a `QuantConfig`."""
    layers = {name: LayerBits(**data[name]) for name in ("bits", "first", "last")}
    overrides = {name: LayerBits(**bits) for name, bits in data["overrides"].items()}
    return QuantConfig(**{**data, **layers, "overrides": overrides})
