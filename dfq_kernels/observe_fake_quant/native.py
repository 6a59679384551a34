"""`observe_fake_quant` in C++: csrc/cpu/observe_fake_quant.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from dfq_kernels.extension import native, where, workspace
from dfq_kernels.fake_quant import native as fake_quant
from dfq_kernels.memory import DTYPES, Updated, dense, mask_like
from dfq_kernels.observe_fake_quant import schema
from dfq_kernels.registration import register


@register(schema.FORWARD, "native")
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
    x = dense(x)
    out, mask = torch.empty_like(x), mask_like(x)
    room = workspace(x, (x.numel(), 1, x.numel()))
    updated = Updated((running_min, running_max, scale, zero_point))
    native().observe_fake_quant_forward(
        DTYPES[x.dtype], where(x, room), x.numel(), x.data_ptr(),
        *[value.data_ptr() for value in updated.values], averaging_constant, quant_min, quant_max, symmetric,
        out.data_ptr(), mask.data_ptr(),
    )  # fmt: skip
    updated.done()
    return out, mask


backward = fake_quant.backward
