"""Ranges without an image, a generator or a step: what batch norms remember of the training data is enough.

    noise, with the images' mean and deviation
    every batch norm normalises it by its own statistics, not by the stored ones
    ranges are what is seen then, narrower with fewer than 8 bits; of an average, what is seen of its input
    weights of fewer than 8 bits have the scale of least squared error; what rounding one adds to the layer's result,
        the others that are still to be rounded take back
    what rounding does to the mean and the variance of a channel is done to what its batch norm stores

A batch norm's result has mean `bias[c]` and deviation `|weight[c]|` over the training data. Normalised by its own
statistics, noise has the same ones there, after every batch norm anew; what lies between two of them is computed of
values that are so distributed. Source of the idea, with normal distributions propagated by formulas: M. Nagel et al.,
Data-Free Quantization Through Weight Equalization and Bias Correction, ICCV 2019, section 4; it corrects means, too.
Depthwise layers need that most: a weight is one of nine there, and moves the mean of its channel when it is rounded.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from dfq.layers.tail import Tail
from dfq.method.clipping import clip_ranges
from dfq.method.compensate import compensate
from dfq.method.noise import Moments, pink_noise
from dfq.quant.modes import FloatRun, averages_as_wide_as_their_inputs, batch_statistics, normalized_tails
from dfq.quant.prepare import prepared_of
from dfq.quant.quantizers import fit_weights

BATCHES = 4
PIXELS = 2**16  # of a batch; of large images fewer
LEAST, MOST = 8, 64  # images of a batch
TINY = 1e-12
RATIOS = 0.1, 10.0  # of variances: a channel that is constant on noise has none


def analytic_network(
    student: fx.GraphModule, moments: Moments, bounds: tuple[Tensor, Tensor] | None = None, *, seed: int = 0
) -> None:
    """Ranges, scales of weights and statistics of batch norms: all that needs no image.

    Args:
        student: of `dfq.quant.prepare`, that has seen nothing yet. Its weights and batch norms are changed, so they are
            not the model's; a weight or batch norm that several layers share stays as it is.
        moments, bounds, seed: as in `analytic_ranges`.

    Raises:
        ValueError: no batch norm.
    """
    fit_weights(student)
    analytic_ranges(student, moments, bounds, seed=seed)
    noise = list(_noise(student, moments, bounds, seed))
    users = Counter(_stored(tail) for tail in normalized_tails(student))
    exact = _statistics(student, noise, FloatRun(student))
    compensate(student, noise[0], seed)
    rounded = _statistics(student, noise, student)
    with torch.no_grad():
        for tail, (mean, variance) in exact.items():
            if users[_stored(tail)] > 1:
                continue
            moved, spread = rounded[tail]
            tail.bn.running_mean.add_(moved - mean)  # type: ignore[union-attr]
            tail.bn.running_var.mul_((spread / variance.clamp(min=TINY)).clamp(*RATIOS))  # type: ignore[union-attr]


def _stored(tail: Tail) -> int:
    """Where a batch norm's mean lies."""
    return tail.bn.running_mean.data_ptr()  # type: ignore[union-attr]


@torch.no_grad()
def analytic_ranges(
    student: fx.GraphModule, moments: Moments, bounds: tuple[Tensor, Tensor] | None = None, *, seed: int = 0
) -> None:
    """Sets every range of a student that has seen nothing yet; those of fewer than 8 bits are clipped.

    Args:
        student: of `dfq.quant.prepare`, ranges `moving`; batch norms stay as they are.
        moments: of the images.
        bounds: what black and white are to the network, `[C]` each; None: not known.
        seed: of the noise.

    Raises:
        ValueError: no batch norm.
    """
    prepared_of(student, "analytic_ranges")
    if not normalized_tails(student):
        raise ValueError("analytic_ranges: student must have batch norms, got none")
    batches = list(_noise(student, moments, bounds, seed))
    with batch_statistics(student), averages_as_wide_as_their_inputs(student):
        for noise in batches:
            student(noise)
    clip_ranges(student, batches[0])


def _noise(
    student: fx.GraphModule, moments: Moments, bounds: tuple[Tensor, Tensor] | None, seed: int
) -> Iterator[Tensor]:
    """Batches with the images' moments, between black and white where these are known."""
    shape = prepared_of(student).input_shape
    images = min(max(PIXELS // math.prod(shape[1:]), LEAST), MOST)
    random = torch.Generator().manual_seed(seed)
    mean = moments.mean.view(-1, *[1] * (len(shape) - 1))
    for _ in range(BATCHES):
        noise = mean + moments.deviation * pink_noise(images, shape, random).to(mean.device)
        if bounds is not None:
            low, high = (end.to(mean.device).view_as(mean) for end in bounds)
            noise = noise.clamp(low, high)
        yield noise


@torch.no_grad()
def _statistics(
    student: fx.GraphModule, noise: Sequence[Tensor], run: Callable[[Tensor], Any]
) -> dict[Tail, tuple[Tensor, Tensor]]:
    """Mean and variance of every channel that a batch norm reads, means over all batches."""
    found: dict[Tail, list[Tensor]] = {}

    def note(tail: Any, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].float()
        found.setdefault(tail, []).append(torch.stack(torch.var_mean(x, (0, *range(2, x.dim())), correction=0)))

    hooks = [tail.register_forward_pre_hook(note) for tail in normalized_tails(student)]
    try:
        with batch_statistics(student):
            for images in noise:
                run(images)
    finally:
        for hook in hooks:
            hook.remove()
    averages = {tail: torch.stack(values).mean(0) for tail, values in found.items()}
    return {tail: (mean, variance) for tail, (variance, mean) in averages.items()}
