"""What every backend of `fake_quant` has: arguments, results and their shapes."""

from __future__ import annotations

import torch
from torch import Tensor

from dfq_kernels.memory import mask_like
from dfq_kernels.registration import Schema


def _forward(
    x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, axis: int | None
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), mask_like(x)


def _mask_backward(grad_out: Tensor, inside: Tensor, size: list[int], stride: list[int]) -> Tensor:
    return torch.empty_strided(size, stride, dtype=grad_out.dtype, device=grad_out.device)


def _backward(
    grad_out: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, axis: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(scale), torch.empty_like(zero_point)


FORWARD = Schema(
    "fake_quant",
    "(Tensor x, Tensor scale, Tensor zero_point, int quant_min, int quant_max, int? axis) -> (Tensor, Tensor)",
    _forward,
)
MASK_BACKWARD = Schema(
    "mask_backward", "(Tensor grad_out, Tensor inside, SymInt[] size, SymInt[] stride) -> Tensor", _mask_backward
)
BACKWARD = Schema(
    "fake_quant_backward",
    "(Tensor grad_out, Tensor x, Tensor scale, Tensor zero_point, int quant_min, int quant_max, int? axis) "
    "-> (Tensor, Tensor, Tensor)",
    _backward,
)
