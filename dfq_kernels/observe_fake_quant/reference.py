"""Moving-average range, quantization parameters and fake quantization in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from dfq_kernels.fake_quant import reference as fake_quant

SCALE_FLOOR = 2.0**-63  # of a range that is a single point: a product of two scales is still a normal number
RANGE_LIMIT = 2.0**126  # the width of a range, and what it moves by, stay finite


def forward(
    x: Tensor,
    running_min: Tensor,
    running_max: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    averaging_constant: float,
    quant_min: int,
    quant_max: int,
    symmetric: bool,
) -> tuple[Tensor, Tensor]:
    """Updates the range and its parameters in place; `(out, inside)` of `fake_quant` with the new ones."""
    low, high = torch.aminmax(x.detach())
    update_range(low, high, running_min, running_max, averaging_constant)
    update_parameters(running_min, running_max, scale, zero_point, quant_min, quant_max, symmetric)
    return fake_quant.forward(x, scale, zero_point, quant_min, quant_max, None)


backward = fake_quant.backward


def update_range(
    low: Tensor, high: Tensor, running_min: Tensor, running_max: Tensor, averaging_constant: float
) -> None:
    """`running += averaging_constant * (batch - running)`; the first batch is taken whole, a non-finite one not.

    A batch counts with at most `RANGE_LIMIT` in magnitude.
    """
    finite = torch.isfinite(low) & torch.isfinite(high)
    first = running_min > running_max
    for running, batch in ((running_min, low), (running_max, high)):
        batch = batch.to(running.dtype).reshape(running.shape).clamp(-RANGE_LIMIT, RANGE_LIMIT)
        moved = torch.where(first, batch, running + averaging_constant * (batch - running))
        running.copy_(torch.where(finite, moved, running))


def update_parameters(
    running_min: Tensor,
    running_max: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    symmetric: bool,
) -> None:
    """Affine: the range with 0 in it onto `[quant_min, quant_max]`; symmetric: its magnitude onto `quant_max`."""
    seen = running_min <= running_max
    low = torch.where(seen, running_min.clamp(max=0), 0)
    high = torch.where(seen, running_max.clamp(min=0), 0)
    if symmetric:
        new_scale = divided(torch.maximum(-low, high), quant_max).clamp(min=SCALE_FLOOR)
        new_zero_point = torch.zeros_like(new_scale)
    else:
        new_scale = divided(high - low, quant_max - quant_min).clamp(min=SCALE_FLOOR)
        new_zero_point = (quant_min - low / new_scale).round().clamp(quant_min, quant_max)
    scale.copy_(new_scale.reshape(scale.shape))
    zero_point.copy_(new_zero_point.reshape(zero_point.shape))


def divided(values: Tensor, divisor: int) -> Tensor:
    """`values / divisor`, rounded once. On a GPU torch multiplies by the reciprocal of a Python number instead."""
    return values / values.new_full((), divisor)
