"""Parts of the integer operators' cases: grids at their ends, integers in every storage, results on several grids."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dfq_kernels.integers import Constants, Grid, QuantizedTensor, Requantize, pack_channels, storage_width
from dfq_kernels.specs import nbytes

Arguments = tuple[dict[str, Any], dict[str, Any]]


def grid(bits: int, signed: bool = False, zero_point: int | None = None, scale: float = 0.0625) -> Grid:
    """A whole range; the zero point one above its lower end unless given."""
    low = -(2 ** (bits - 1)) if signed else 0
    return Grid(scale, low + 1 if zero_point is None else zero_point, low, low + 2**bits - 1)


def integers(generator: torch.Generator, shape: tuple[int, ...], on: Grid, packed: bool = False) -> dict[str, Any]:
    """Every integer of a grid, in memory as `QuantizedTensor` has it."""
    dtype = torch.int8 if on.signed else torch.uint8
    q = torch.randint(on.quant_min, on.quant_max + 1, shape, generator=generator).to(dtype)
    bits = storage_width(on.bits, shape[1]) if packed else 8
    return {"q": pack_channels(q, bits), "bits": bits}


def batch_norm(generator: torch.Generator, channels: int) -> dict[str, Tensor]:
    """mean, mult and bias."""
    return {name: torch.randn(channels, generator=generator) for name in ("mean", "mult", "bias")}


# results of every storage, of two grids at once, and real numbers
ENDS: dict[str, dict[str, Any]] = {
    "one": {"outs": (grid(8),), "activation": "relu"},
    "packed": {"outs": (grid(4), grid(2, True, 0, 0.5)), "packed": True, "activation": "relu6"},
    "real": {"outs": ()},
    "gated": {"outs": (grid(8, True, 3),), "activation": "hardswish"},
    "leaky": {"outs": (grid(8, True, -20), grid(4)), "packed": True, "activation": "leaky_relu(0.3)"},
    "clipped": {"outs": (), "activation": "hardtanh(-0.7,1.3)"},
}


def following(generator: torch.Generator, channels: int) -> Requantize:
    """A batch norm, a ReLU and a grid, as a pre-activation network has behind its additions."""
    return Requantize((grid(4, scale=0.25), grid(8)), **batch_norm(generator, channels), activation="relu")


def on_device(then: Requantize | None, like: Tensor) -> Requantize | None:
    """What follows, where its operator runs."""
    if then is None:
        return None
    moved = [None if vector is None else vector.to(like.device) for vector in then.constants]
    changes: dict[str, Any] = dict(zip(Constants._fields, moved, strict=True))
    return replace(then, **changes)


def as_tensors(results: Any) -> Any:
    """What a test compares."""
    if isinstance(results, QuantizedTensor):
        return results.q
    return results if isinstance(results, Tensor) else tuple(result.q for result in results)


def bytes_moved(tensors: dict[str, Any], keywords: dict[str, Any], pixels: int, channels: int) -> tuple[int, int]:
    """Every tensor read once, the results of `pixels` pixels written once; there is no backward."""
    read = nbytes(*[value for value in tensors.values() if isinstance(value, Tensor)])
    then = keywords.get("then")
    grids = [*keywords["outs"], *(then.outs if then else ())]
    widths = [storage_width(item.bits, channels) if keywords.get("packed") else 8 for item in grids] or [32]
    return read + pixels * channels * sum(widths) // 8, 0
