"""What users have today for each operator: torch's own calls, as a forward that autograd can go back through.

torch's fake quantization takes fp32 alone: values of another type are converted around it, as its users must.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import dfq_kernels as k


@dataclass(frozen=True)
class Row:
    """One measured operator on one activation tensor: ours (with a backend) and what torch has.

    ours(x, backend), theirs(x): forward; settings: keyword arguments that `OpSpec.bytes_moved` reads;
    forward_least, backward_least: tensors of the size of x that must be read and written at least.
    """

    op: str
    name: str
    ours: Callable[[Tensor, str], Any]
    theirs: Callable[[Tensor], Any]
    forward_least: tuple[int, int] = (1, 1)
    backward_least: tuple[int, int] = (1, 1)
    settings: Mapping[str, Any] = field(default_factory=dict)


class Operands:
    """The tensors beside x, made once: scales, a moving range, batch norms by their number of channels."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        values = {"running_min": -3.0, "running_max": 3.0, "scale": 0.1, "zero_point": 0.0}
        self.range = {name: torch.tensor(value, device=device) for name, value in values.items()}
        self.scale, self.zero_point = torch.tensor(0.1, device=device), torch.zeros((), device=device)
        self.whole = torch.zeros(1, dtype=torch.int32, device=device)
        low, high = (torch.tensor(value, device=device) for value in (-3.0, 3.0))
        self.observer = low, high, torch.ones(1, device=device), self.whole
        self.on = torch.ones(1, dtype=torch.long, device=device)
        self._channels: dict[int, dict[str, Tensor]] = {}

    def channels(self, x: Tensor) -> dict[str, Tensor]:
        """What operators need per channel of x."""
        count = x.shape[1]
        if count not in self._channels:
            generator = torch.Generator().manual_seed(1)
            values = {
                "weight": torch.randn(count, generator=generator), "bias": torch.randn(count, generator=generator),
                "running_mean": torch.zeros(count), "running_var": torch.ones(count),
                "scale": torch.linspace(0.05, 0.15, count), "zero_point": torch.zeros(count),
                "whole": torch.zeros(count, dtype=torch.int32),
            }  # fmt: skip
            self._channels[count] = {name: value.to(self.device) for name, value in values.items()}
        return self._channels[count]

    def batch_norm(self, x: Tensor) -> dict[str, Tensor]:
        p = self.channels(x)
        return {name: p[name] for name in ("weight", "bias", "running_mean", "running_var")}

    def grid(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.channels(x)["scale"], self.channels(x)["zero_point"]


def rows(device: torch.device) -> list[Row]:
    """Every operator on one activation tensor."""
    own = Operands(device)

    def per_tensor(x: Tensor) -> Tensor:
        return torch.fake_quantize_per_tensor_affine(x.float(), own.scale, own.whole[0], 0, 255).to(x.dtype)

    def per_channel(x: Tensor) -> Tensor:
        p = own.channels(x)
        return torch.fake_quantize_per_channel_affine(x.float(), p["scale"], p["whole"], 1, 0, 255).to(x.dtype)

    def observed(x: Tensor) -> Tensor:
        return torch.fused_moving_avg_obs_fake_quant(
            x.float(), own.on, own.on, *own.observer, 0.01, 0, 255, -1, False, False
        ).to(x.dtype)

    def norm(x: Tensor, training: bool) -> Tensor:
        p = own.batch_norm(x)
        return F.relu(F.batch_norm(x, p["running_mean"], p["running_var"], p["weight"], p["bias"], training))

    def statistics(x: Tensor) -> tuple[Tensor, ...]:
        return torch.var_mean(x, (0, 2, 3), unbiased=False)

    def student(x: Tensor, backend: str, training: bool) -> Tensor:
        return k.bn_act_fake_quant(x, **own.batch_norm(x), **own.range, training=training, backend=backend)

    return [
        Row("fake_quant", "per tensor", lambda x, b: k.fake_quant(x, own.scale, own.zero_point, 0, 255, backend=b),
            per_tensor),
        Row("fake_quant", "per channel",
            lambda x, b: k.fake_quant(x, *own.grid(x), 0, 255, 1, backend=b), per_channel),
        Row("observe_fake_quant", "", lambda x, b: k.observe_fake_quant(x, **own.range, backend=b), observed),
        Row("bn_stats", "", lambda x, b: k.bn_stats(x, backend=b), statistics, forward_least=(1, 0)),
        Row("bn_act_stats", "", lambda x, b: k.bn_act_stats(x, **own.batch_norm(x), backend=b),
            lambda x: (norm(x, False), *statistics(x)), backward_least=(2, 1)),
        *(Row("bn_act_fake_quant", name, lambda x, b, training=training: student(x, b, training),
              lambda x, training=training: observed(norm(x, training)), backward_least=(2, 1),
              settings={"training": training})
          for name, training in (("training", True), ("frozen", False))),
    ]  # fmt: skip


def resnet18_weights(device: torch.device) -> list[Tensor]:
    """The convolutions of ResNet-18 and its head."""
    shapes = [(64, 3, 7, 7)]
    for before, after in ((64, 64), (64, 128), (128, 256), (256, 512)):
        shapes += [(after, before, 3, 3), *[(after, after, 3, 3)] * 3]
        shapes += [(after, before, 1, 1)] if before != after else []
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(shape, generator=generator).to(device) for shape in [*shapes, (1000, 512)]]


def torch_weights(weights: list[Tensor]) -> list[Tensor]:
    """Per layer: the magnitude's maximum, the scale, torch's fake quantization per channel."""
    outs = []
    for weight in weights:
        scale = weight.flatten(1).abs().amax(1) / 7
        zero_point = torch.zeros(len(scale), dtype=torch.int32, device=scale.device)
        outs.append(torch.fake_quantize_per_channel_affine(weight, scale, zero_point, 0, -7, 7))
    return outs
