"""What the bytes of images stand for."""

from __future__ import annotations

import torch
from torch import Tensor

Normalization = tuple[tuple[float, ...], tuple[float, ...]]


def normalized(pixels: Tensor, normalization: Normalization) -> Tensor:
    """`(pixels / 255 - mean) / std`, fp32; pixels: uint8 `[N, C, ...]`, mean and std: per channel."""
    axes = [1] * (pixels.dim() - 2)
    mean, std = (torch.tensor(part, device=pixels.device).view(-1, *axes) for part in normalization)
    full = torch.full((), 255.0, device=pixels.device)  # a GPU multiplies by the reciprocal of a number
    return (pixels.float() / full - mean) / std


def pixel_values(normalization: Normalization) -> Tensor:
    """fp32 `[C, 256]`: every byte in every channel."""
    codes = torch.arange(256).to(torch.uint8)
    return normalized(codes.expand(1, len(normalization[0]), 256), normalization)[0]
