"""Settings as data: frozen dataclasses and named presets. The resolved config is written beside every run."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

PRESETS = ("W8A8", "W4A8", "W4A4", "W3A3", "W2A4", "W2A2", "gdfq")
"""Named bit widths. Any `W<2-8>A<2-8>` works, and any of them behind `gdfq-`; `gdfq` alone is `gdfq-W4A4`."""


def check(owner: str, name: str, value: Any, rule: str, ok: bool) -> None:
    """Raises `<owner>: <name> must be <rule>, got <value>` unless `ok`."""
    if not ok:
        raise ValueError(f"{owner}: {name} must be {rule}, got {value!r}")


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
        overrides: bits by layer name, as in `model.named_modules()`; they win over `first` and `last`.
        ranges: `minmax` (moving average) or `lsq` (learned step sizes, for fewer than 8 bits).
        weight_scheme: `symmetric` or `affine`, per output channel.
        activations: `all` (an integer network: image, every layer's input, every residual stream) or
            `after_relu` (only inputs that come from a ReLU; not an integer network, for comparison with the literature).
        residual_bits: of residual streams and of pooled maps.
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
        check("QuantConfig", "residual_bits", self.residual_bits, "in [2, 8]", 2 <= self.residual_bits <= 8)
        check("QuantConfig", "averaging_constant", self.averaging_constant, "in (0, 1]", 0 < self.averaging_constant <= 1)


def quant_config(preset: str, *, ranges: str = "minmax", overrides: Mapping[str, LayerBits] | None = None) -> QuantConfig:
    """The config of a preset.

    `W4A4`: 4-bit weights and activations between 8-bit edge layers. `gdfq-W4A4`: the convention of GDFQ and its
    descendants: edge layers at these bits too, affine min/max weights, only activations behind a ReLU.

    Args:
        preset: one of `PRESETS`, or any `[gdfq-]W<2-8>A<2-8>`.
        ranges: `minmax` or `lsq`; the `gdfq` presets are min/max by definition.
        overrides: bits by layer name.

    Raises:
        ValueError: an unknown preset, or bits out of range.
    """
    match = re.fullmatch(r"(?:(gdfq)-)?W(\d+)A(\d+)", "gdfq-W4A4" if preset == "gdfq" else preset)
    if match is None:
        raise ValueError(f"quantize: preset must be one of {', '.join(PRESETS)} or [gdfq-]W<bits>A<bits>, got {preset!r}")
    bits = LayerBits(int(match[2]), int(match[3]))
    if match[1]:
        return QuantConfig(
            bits, bits, bits, dict(overrides or {}), weight_scheme="affine", activations="after_relu"
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
        check("teach", "epochs", self.epochs, "at least 1", self.epochs >= 1)
        check("teach", "batch_size", self.batch_size, "at least 2", self.batch_size >= 2)
        check("teach", "learning_rate", self.learning_rate, "> 0", self.learning_rate > 0)
        check("teach", "weight_decay", self.weight_decay, ">= 0", self.weight_decay >= 0)


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
