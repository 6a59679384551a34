"""Integers of few bits in bytes: 8, 4 or 2 bits each, the first in the lowest bits."""

from __future__ import annotations

import torch
from torch import Tensor

STORED_BITS = (8, 4, 2)


def stored_bits(bits: int) -> int:
    """The width in which integers of `bits` bits are stored: 8, 4 or 2."""
    return next(width for width in reversed(STORED_BITS) if width >= bits)


def pack_bits(q: Tensor, bits: int) -> Tensor:
    """Packs signed or unsigned integers into bytes.

        byte[i] = sum over k of (q[i * n + k] mod 2^bits) << (bits k),  n = 8 / bits

    Args:
        q: any shape, an integer dtype; values in `[-2^(bits-1), 2^bits - 1]`.
        bits: 8, 4 or 2.

    Returns:
        uint8 `[ceil(q.numel() / n)]`; the last byte is filled with zeros.

    Raises:
        ValueError: other bits, another dtype, or a value that does not fit.
    """
    _check("pack_bits", bits)
    if q.dtype not in (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64):
        raise ValueError(f"pack_bits: q must be of an integer dtype, got {q.dtype}")
    low, high = -(2 ** (bits - 1)), 2**bits - 1
    if q.numel() and not (low <= int(q.min()) and int(q.max()) <= high):
        raise ValueError(f"pack_bits: q must be in [{low}, {high}], got {int(q.min())} to {int(q.max())}")
    per_byte = 8 // bits
    flat = q.flatten().to(torch.int64) & (2**bits - 1)
    flat = torch.nn.functional.pad(flat, (0, -len(flat) % per_byte)).view(-1, per_byte)
    shifts = torch.arange(per_byte, device=q.device) * bits
    return (flat << shifts).sum(1).to(torch.uint8)


def unpack_bits(packed: Tensor, bits: int, size: int, *, signed: bool) -> Tensor:
    """The first `size` integers that `pack_bits` packed.

    Args:
        packed: uint8, one-dimensional.
        bits: 8, 4 or 2.
        size: how many.
        signed: two's complement, or none negative.

    Returns:
        int8 if signed, else uint8; `[size]`.

    Raises:
        ValueError: other bits, another dtype, or fewer bytes than `size` needs.
    """
    _check("unpack_bits", bits)
    if packed.dtype != torch.uint8 or packed.dim() != 1:
        raise ValueError(f"unpack_bits: packed must be uint8 and flat, got {packed.dtype} {tuple(packed.shape)}")
    per_byte = 8 // bits
    if not 0 <= size <= len(packed) * per_byte:
        raise ValueError(f"unpack_bits: size must be in [0, {len(packed) * per_byte}], got {size}")
    shifts = torch.arange(per_byte, device=packed.device) * bits
    values = ((packed.to(torch.int64)[:, None] >> shifts) & (2**bits - 1)).flatten()[:size]
    if not signed:
        return values.to(torch.uint8)
    return torch.where(values >= 2 ** (bits - 1), values - 2**bits, values).to(torch.int8)


def _check(owner: str, bits: int) -> None:
    if bits not in STORED_BITS:
        raise ValueError(f"{owner}: bits must be 8, 4 or 2, got {bits!r}")
