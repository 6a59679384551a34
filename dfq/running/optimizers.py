"""Optimizers whose learning rate is a tensor on their device, so that a captured step follows its schedule; schedules.

Fused: one launch for all parameters on a GPU, a third of the time on a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


def sgd(parameters: Iterable[nn.Parameter], peak: float, *, weight_decay: float) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum 0.9; `peak`: the schedule's highest learning rate."""
    groups, rate = _scheduled(parameters, peak)
    return torch.optim.SGD(groups, lr=rate, momentum=0.9, nesterov=True, weight_decay=weight_decay, fused=True)


def adam(
    parameters: Iterable[nn.Parameter], peak: float, *, betas: tuple[float, float] = (0.9, 0.999)
) -> torch.optim.Optimizer:
    """Adam; `peak`: the schedule's highest learning rate."""
    groups, rate = _scheduled(parameters, peak)
    return torch.optim.Adam(groups, lr=rate, betas=betas, fused=True, capturable=True)


def _scheduled(parameters: Iterable[nn.Parameter], peak: float) -> tuple[list[dict[str, Any]], torch.Tensor]:
    held = list(parameters)
    return [{"params": held, "peak": peak}], torch.tensor(peak, device=held[0].device)


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Sets every group to its own `peak` times `value`: queued on the device, not waited for."""
    for group in optimizer.param_groups:
        group["lr"].fill_(group["peak"] * value)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """`load_state_dict` for fused optimizers: rates stay the tensors that they are, and moments get the memory order of
    their parameters, which fused kernels take for granted."""
    rates = [group["lr"] for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate.copy_(group["lr"])
    for parameter, moments in optimizer.state.items():
        for name, value in moments.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                moments[name] = torch.empty_like(parameter, requires_grad=False).copy_(value)


def cosine(index: int, total: int) -> float:
    """1 at the first step, towards 0 at the last: `(1 + cos(pi index / total)) / 2`."""
    return 0.5 * (1 + math.cos(math.pi * index / max(total, 1)))


def one_cycle(index: int, total: int, warm_up: float = 0.3) -> float:
    """A cosine up from 1/25 over the first `warm_up` of the run, then a cosine down to 0. Source: arXiv 1708.07120."""
    peak = max(warm_up * total, 1.0)
    if index < peak:
        return 1 / 25 + (1 - 1 / 25) * (1 - cosine(index, int(peak)))
    return cosine(index - int(peak), total - int(peak))
