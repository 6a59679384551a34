"""What users have today for each operator: torch's own calls, as a forward that autograd can go back through."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import dfq_kernels as k


@dataclass(frozen=True)
class Row:
    """One measured operator: ours (with a backend) and the strongest that torch has.

    ours(x, backend), theirs(x): forward; tensors: 1-bit masks and vectors aside, how many tensors of the size of x
    the ideal forward and backward move; backward: whether it is measured too.
    """

    op: str
    name: str
    ours: Callable[[Tensor, str], Any]
    theirs: Callable[[Tensor], Any]
    forward_tensors: float
    backward_tensors: float
    backward: bool = True


def _channels(x: Tensor) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    count = x.shape[1]
    return {
        "weight": torch.randn(count, generator=generator),
        "bias": torch.randn(count, generator=generator),
        "running_mean": torch.zeros(count),
        "running_var": torch.ones(count),
    }


def _range() -> dict[str, Tensor]:
    values = {"running_min": -3.0, "running_max": 3.0, "scale": 0.1, "zero_point": 0.0}
    return {name: torch.tensor(value) for name, value in values.items()}


def _observed(x: Tensor, state: dict[str, Tensor]) -> Tensor:
    on = torch.ones(1, dtype=torch.long)
    return torch.fused_moving_avg_obs_fake_quant(
        x, on, on, state["low"], state["high"], state["scale"], state["zero_point"], 0.01, 0, 255, -1, False, False
    )


def _observer() -> dict[str, Tensor]:
    low, high = torch.tensor(-3.0), torch.tensor(3.0)
    return {"low": low, "high": high, "scale": torch.ones(1), "zero_point": torch.zeros(1, dtype=torch.int32)}


def rows() -> list[Row]:
    """Every operator on one activation tensor."""
    one, ranges, state = torch.tensor(0.1), _range(), _observer()
    zero, nought = torch.zeros(1, dtype=torch.int32), torch.zeros(())
    scales: dict[int, Tensor] = {}
    parameters: dict[int, dict[str, Tensor]] = {}

    def channels(x: Tensor) -> dict[str, Tensor]:
        return parameters.setdefault(x.shape[1], _channels(x))

    def scale_of(x: Tensor) -> Tensor:
        return scales.setdefault(x.shape[1], torch.linspace(0.05, 0.15, x.shape[1]))

    def teacher(x: Tensor) -> tuple[Tensor, ...]:
        p = channels(x)
        out = F.relu(F.batch_norm(x, p["running_mean"], p["running_var"], p["weight"], p["bias"], False))
        return out, *torch.var_mean(x, (0, 2, 3), unbiased=False)

    def student(x: Tensor, training: bool) -> Tensor:
        p = channels(x)
        out = F.batch_norm(x, p["running_mean"], p["running_var"], p["weight"], p["bias"], training)
        return _observed(F.relu(out), state)

    def ours_student(x: Tensor, backend: str, training: bool) -> Tensor:
        return k.bn_act_fake_quant(x, **channels(x), **ranges, training=training, backend=backend)

    return [
        Row("fake_quant", "per tensor", lambda x, b: k.fake_quant(x, one, 0.0, 0, 255, backend=b),
            lambda x: torch.fake_quantize_per_tensor_affine(x, one, zero[0], 0, 255), 2, 2),
        Row("fake_quant", "per channel", lambda x, b: k.fake_quant(x, scale_of(x), nought, 0, 255, 1, backend=b),
            lambda x: torch.fake_quantize_per_channel_affine(x, scale_of(x), zero.expand(x.shape[1]), 1, 0, 255), 2, 2),
        Row("observe_fake_quant", "", lambda x, b: k.observe_fake_quant(x, **ranges, backend=b),
            lambda x: _observed(x, state), 3, 2),
        Row("bn_stats", "", lambda x, b: k.bn_stats(x, backend=b),
            lambda x: torch.var_mean(x, (0, 2, 3), unbiased=False), 1, 2),
        Row("bn_act_stats", "", lambda x, b: k.bn_act_stats(x, **channels(x), backend=b), teacher, 2, 3),
        Row("bn_act_fake_quant", "training", lambda x, b: ours_student(x, b, True), lambda x: student(x, True), 3, 5),
        Row("bn_act_fake_quant", "frozen", lambda x, b: ours_student(x, b, False), lambda x: student(x, False), 3, 3),
    ]  # fmt: skip


def resnet18_weights() -> list[Tensor]:
    """The convolutions of ResNet-18 and its head."""
    shapes = [(64, 3, 7, 7)]
    for before, after in ((64, 64), (64, 128), (128, 256), (256, 512)):
        shapes += [(after, before, 3, 3), *[(after, after, 3, 3)] * 3]
        shapes += [(after, before, 1, 1)] if before != after else []
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(shape, generator=generator) for shape in [*shapes, (1000, 512)]]


def torch_weights(weights: list[Tensor]) -> list[Tensor]:
    """Per layer: the magnitude's maximum, the scale, torch's fake quantization per channel."""
    outs = []
    for weight in weights:
        scale = weight.flatten(1).abs().amax(1) / 7
        zero_point = torch.zeros(len(scale), dtype=torch.int32)
        outs.append(torch.fake_quantize_per_channel_affine(weight, scale, zero_point, 0, -7, 7))
    return outs
