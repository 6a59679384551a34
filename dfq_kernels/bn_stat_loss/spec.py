"""Cases of `bn_stat_loss`: several layers, dead channels, equal statistics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dfq_kernels.bn_stat_loss.api import bn_stat_loss
from dfq_kernels.specs import Case, OpSpec, nbytes, randn

Arguments = tuple[dict[str, Any], dict[str, Any]]
LISTS = ("mean", "var", "running_mean", "running_var")


def _call(eps: float | Sequence[float], backend: str | None = None, **tensors: Tensor) -> Tensor:
    lists = [[value for name, value in tensors.items() if name.rpartition("_")[0] == prefix] for prefix in LISTS]
    return bn_stat_loss(*lists, eps=eps, backend=backend)


def _random(*channels: int, eps: Any = 1e-5, dead: bool = False) -> Any:
    def make(generator: torch.Generator) -> Arguments:
        tensors: dict[str, Any] = {}
        for name in LISTS:
            for layer, count in enumerate(channels):
                values = randn(generator, count)
                tensors[f"{name}_{layer}"] = values.square() + 0.1 if "var" in name else values
        if dead:
            tensors["var_0"][0] = 0.0
            tensors["running_var_0"][1] = 0.0
        return tensors, {"eps": eps}

    return make


SPEC = OpSpec(
    op="bn_stat_loss",
    call=_call,
    differentiable=tuple(f"{name}_{layer}" for name in LISTS[:2] for layer in range(3)),
    exact=False,
    rtol=1e-5,
    atol=1e-5,
    cases=(
        Case("one_layer", _random(16)),
        Case("layers", _random(16, 7, 64)),
        Case("more_layers_than_one_launch", _random(*range(1, 101))),
        Case("eps_per_layer", _random(16, 7, eps=[1e-5, 0.5])),
        Case("dead_channels", _random(8, 8, eps=1e-3, dead=True)),
    ),
    bytes_moved=lambda tensors, _: (nbytes(*tensors.values()), 2 * nbytes(*tensors.values())),
    mutations=(
        ("0.5 * torch.log", "1.0 * torch.log"),
        ("/ (2 * running_var)", "/ (2 * var)"),
        ("- 0.5\n", "\n"),
        ("torch.where(var >= floor, grad_out * slope, 0)", "grad_out * slope"),
        ("running_var.clamp(min=floor)\n        terms", "running_var\n        terms"),
    ),
)
