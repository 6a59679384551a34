"""Ranges without an image, a generator or a step: what batch norms remember of the training data is enough.

    noise, with the images' mean and deviation
    every batch norm normalises it by its own statistics, not by the stored ones
    ranges are what is seen then; of an average, what is seen of its input

A batch norm's result has mean `bias[c]` and deviation `|weight[c]|` over the training data. Normalised by its own
statistics, noise has the same ones there, after every batch norm anew; what lies between two of them is computed of
values that are so distributed. Source of the idea, with normal distributions propagated by formulas: M. Nagel et al.,
Data-Free Quantization Through Weight Equalization and Bias Correction, ICCV 2019, section 4.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, fx

from dfq.method.noise import Moments, pink_noise
from dfq.quant.modes import averages_as_wide_as_their_inputs, batch_statistics, normalized_tails
from dfq.quant.prepare import prepared_of

BATCHES = 4
PIXELS = 2**16  # of a batch; of large images fewer
LEAST, MOST = 8, 64  # images of a batch


@torch.no_grad()
def analytic_ranges(
    student: fx.GraphModule, moments: Moments, bounds: tuple[Tensor, Tensor] | None = None, *, seed: int = 0
) -> None:
    """Sets every range of a student that has seen nothing yet.

    Args:
        student: of `dfq.quant.prepare`, ranges `moving`; batch norms stay as they are.
        moments: of the images.
        bounds: what black and white are to the network, `[C]` each; None: not known.
        seed: of the noise.

    Raises:
        ValueError: no batch norm.
    """
    shape = prepared_of(student, "analytic_ranges").input_shape
    images = min(max(PIXELS // math.prod(shape[1:]), LEAST), MOST)
    random = torch.Generator().manual_seed(seed)
    mean = moments.mean.view(-1, *[1] * (len(shape) - 1))
    if not normalized_tails(student):
        raise ValueError("analytic_ranges: student must have batch norms, got none")
    with batch_statistics(student), averages_as_wide_as_their_inputs(student):
        for _ in range(BATCHES):
            noise = mean + moments.deviation * pink_noise(images, shape, random).to(mean.device)
            if bounds is not None:
                low, high = (end.to(mean.device).view_as(mean) for end in bounds)
                noise = noise.clamp(low, high)
            student(noise)
