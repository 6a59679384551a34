"""Bits of every layer's weights within a budget: the least harm by a table of measured sensitivities.

    s[l, b] = D(teacher, student whose layer l alone has weights of b bits), on generated images
    minimise  sum over layers of s[l, b_l]    subject to    sum over layers of cost[l, b_l] <= budget

The sum takes for granted that layers do not make up for one another. Source of the idea: H. V. Habi et al., HPTQ:
Hardware-Friendly Post Training Quantization, arXiv 2109.09113, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, fx

import dfq_kernels
from dfq.errors import check
from dfq.method.objective import Objective
from dfq.quant.modes import FloatRun
from dfq.quant.quantizers import least_squares_scale, weight_layers
from dfq_kernels.observe_fake_quant.reference import SCALE_FLOOR, divided
from dfq_kernels.packing import stored_bits

CANDIDATES = (2, 3, 4, 5, 6, 7, 8)
UNITS = 2**14  # in which a budget is counted: each layer's cost is rounded up to the next
PIXELS, LEAST, MOST = 2**18, 16, 256  # of the images that sensitivities are measured on: fewer large ones


@dataclass(frozen=True)
class Budget:
    """Of all weights of a network; one of both is given.

    average_bits: over all weights. weight_bytes: of weights as files hold them, in 2, 4 or 8 bits.
    other_bytes: of the file, that are no weights. kept: layers whose bits were said, and count as they are.
    """

    average_bits: float | None = None
    weight_bytes: int | None = None
    other_bytes: int = 0
    kept: tuple[str, ...] = ()

    def costs(self, counts: Mapping[str, int]) -> dict[str, dict[int, float]]:
        """Bits, or bytes, of each layer for each number of bits; counts: of every layer's weights."""
        if self.average_bits is not None:
            return {name: {bits: count * bits for bits in CANDIDATES} for name, count in counts.items()}
        return {
            name: {bits: math.ceil(count * stored_bits(bits) / 8) for bits in CANDIDATES}
            for name, count in counts.items()
        }

    def total(self, counts: Mapping[str, int]) -> float:
        if self.average_bits is not None:
            return self.average_bits * sum(counts.values())
        assert self.weight_bytes is not None
        return self.weight_bytes


def weight_counts(student: fx.GraphModule) -> dict[str, int]:
    """How many weights every layer has."""
    return {name: weight.numel() for name, _, weight in weight_layers(student)}


def check_budget(student: fx.GraphModule, budget: Budget, owner: str) -> None:
    """Refuses what even the fewest bits do not fit into."""
    counts = weight_counts(student)
    costs, present = budget.costs(counts), {name: layer.bits for name, layer, _ in weight_layers(student)}
    least = sum(
        item[present[name]] if name in budget.kept else min(item.values()) for name, item in costs.items()
    )  # fmt: skip
    if budget.average_bits is not None:
        needed = least / sum(counts.values())
        rule = f"at least {needed:.3g} for this network"
        check(owner, "average_bits", budget.average_bits, rule, needed <= budget.average_bits)
    else:
        others, room = budget.other_bytes, budget.total(counts)
        check(owner, "size", int(room + others), f"at least {int(least + others)} for this network", least <= room)


def choose_bits(
    student: fx.GraphModule, objective: Objective, batch: Callable[[int], Tensor], budget: Budget
) -> dict[str, int]:
    """Bits of the layers that are not kept; batch: images by number."""
    batches = [batch(0).float()]
    count = min(max(PIXELS // batches[0][0, 0].numel(), LEAST), MOST)
    batches += [batch(number).float() for number in range(1, -(-count // len(batches[0])))]
    found = sensitivities(student, objective, batches, budget.kept)
    present = {name: layer.bits for name, layer, _ in weight_layers(student)}
    return chosen_bits(found, weight_counts(student), present, budget)


@torch.no_grad()
def sensitivities(
    student: fx.GraphModule, objective: Objective, batches: Sequence[Tensor], kept: Sequence[str] = ()
) -> dict[str, dict[int, float]]:
    """`s[l, b]` of every layer that is not kept: its weights at the scale of least squared error, all else is float.

    Args:
        student: of `dfq.quant.prepare`.
        objective: what its outputs mean.
        batches: of images.
    """
    wanted = [FloatRun(student)(images) for images in batches]
    found: dict[str, dict[int, float]] = {}
    for name, _, weight in weight_layers(student):
        if name in kept:
            continue
        found[name] = {}
        for bits in CANDIDATES:
            run = FloatRun(student, {name: rounded(weight.detach(), bits)})
            apart = [objective.divergences(want, run(images)) for want, images in zip(wanted, batches, strict=True)]
            found[name][bits] = float(torch.cat(apart).mean())
    return found


def rounded(weight: Tensor, bits: int) -> Tensor:
    """Fake-quantized by output channel, symmetric, with the scale of least squared error."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    widest = divided(weight.flatten(1).abs().amax(1), high).clamp(min=SCALE_FLOOR)
    scale = least_squares_scale(weight, widest, low, high)
    return dfq_kernels.fake_quant(weight, scale, torch.zeros_like(scale), low, high, axis=0)


def chosen_bits(
    found: Mapping[str, Mapping[int, float]], counts: Mapping[str, int], present: Mapping[str, int], budget: Budget
) -> dict[str, int]:
    """The bits of every layer that is not kept, of least harm within the budget, exact but for the rounding to units.

    Fewer bits that do less harm on these images are chance: a layer's harm is made to fall as its bits grow.

    Args:
        found: sensitivities.
        counts: of weights by layer.
        present: bits of every layer as it is, which those that are kept have.
        budget: fits (`check_budget`).
    """
    costs = budget.costs(counts)
    free = budget.total(counts) - sum(costs[name][present[name]] for name in counts if name not in found)
    unit = max(free / UNITS, 1e-12)
    best = np.zeros(UNITS + 1)  # least harm of the layers so far, by units used
    choices: list[np.ndarray] = []
    for name, harms in found.items():
        falling = dict(zip(CANDIDATES, np.maximum.accumulate([harms[b] for b in CANDIDATES[::-1]])[::-1], strict=True))
        options = np.full((len(CANDIDATES), UNITS + 1), np.inf)
        for row, bits in enumerate(CANDIDATES):
            used = math.ceil(costs[name][bits] / unit - 1e-9)
            if used <= UNITS:
                options[row, used:] = best[: UNITS + 1 - used] + falling[bits]
        choices.append(options.argmin(0))
        best = options.min(0)
    bits_of: dict[str, int] = {}
    left = UNITS
    for (name, _), choice in zip(reversed(list(found.items())), reversed(choices), strict=True):
        bits_of[name] = CANDIDATES[choice[left]]
        left -= math.ceil(costs[name][bits_of[name]] / unit - 1e-9)
    return {name: bits_of[name] for name in found}
