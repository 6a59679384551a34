"""Where torch's bilinear interpolation reads, along one axis."""

from __future__ import annotations

import torch
from torch import Tensor


def places(side: int, out: int, align_corners: bool) -> tuple[Tensor, Tensor]:
    """int32 `[2, out]`, both neighbours of every place; fp32 `[out]`, the weight of the second."""
    if align_corners:
        at = torch.arange(out).double() * ((side - 1) / (out - 1) if out > 1 else 0.0)
    else:
        at = ((torch.arange(out).double() + 0.5) * (side / out) - 0.5).clamp(min=0)
    first = at.floor().long().clamp(max=side - 1)
    return torch.stack([first, (first + 1).clamp(max=side - 1)]).int(), (at - first).float()
