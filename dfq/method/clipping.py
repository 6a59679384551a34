"""Ranges of few bits: as narrow as the squared error wants them.

    range = ratio (min, max),  ratio in (0, 1] of least  E[(fake_quant(x) - x)^2]

With 8 bits the ends of what was seen are the range. With 3 most values share few integers then, and what is cut off
costs less than what all others gain. The values are those of the float network, so that no layer's range depends on how
others are rounded. Source: R. Banner et al., Post training 4-bit quantization, NeurIPS 2019.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

import dfq_kernels
from dfq.layers.kind import Layer
from dfq.quant.modes import FloatRun, batch_statistics
from dfq.quant.quantizers import ActivationQuantizer

RATIOS = 40  # of which the best is taken, from 1/40 on
VALUES = 2**17  # of a layer, that are looked at


@torch.no_grad()
def clip_ranges(student: fx.GraphModule, images: Tensor) -> None:
    """Narrows the ranges of fewer than 8 bits.

    Args:
        student: of `dfq.quant.prepare`, whose ranges have been set. Those of averages stay: of noise, they say nothing.
        images: `[N, ...]`; batch norms normalise them by their own statistics.
    """
    averages = [module.tail.quantizer for module in student.modules() if isinstance(module, Layer) and module.averages]
    quantizers = [
        module
        for module in student.modules()
        if isinstance(module, ActivationQuantizer) and module.bits < 8 and module.seen and module not in averages
    ]
    found: dict[ActivationQuantizer, Tensor] = {}

    def note(quantizer: Any, inputs: tuple[Tensor, ...]) -> None:
        values = inputs[0].float().flatten()
        found[quantizer] = values[:: -(-len(values) // VALUES)]

    hooks = [quantizer.register_forward_pre_hook(note) for quantizer in quantizers]
    try:
        with batch_statistics(student, ranges=False):
            FloatRun(student)(images)
    finally:
        for hook in hooks:
            hook.remove()
    for quantizer, values in found.items():
        _clip(quantizer, values)


def _clip(quantizer: ActivationQuantizer, values: Tensor) -> None:
    low, high = quantizer.running_min.clone(), quantizer.running_max.clone()
    errors = []
    for step in range(1, RATIOS + 1):
        quantizer.set_range(low * (step / RATIOS), high * (step / RATIOS))
        grid = quantizer.scale, quantizer.zero_point, quantizer.quant_min, quantizer.quant_max
        errors.append((dfq_kernels.fake_quant(values, *grid) - values).square().mean())
    best = (1 + int(torch.stack(errors).argmin())) / RATIOS
    quantizer.set_range(low * best, high * best)
