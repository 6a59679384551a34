"""The rules that several operators have for their arguments. Text: `<op>: <argument> must be <rule>, got <value>`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
QUANT_LIMIT = 2**23  # integers up to here, and their sums with a zero point, are exact in fp32


def check_float(op: str, name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise ValueError(f"{op}: {name} must be a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in FLOATS:
        raise ValueError(f"{op}: {name} must be float32, bfloat16, float16 or float64, got {x.dtype}")
    if x.layout is not torch.strided:
        raise ValueError(f"{op}: {name} must be a dense tensor, got {x.layout}")
    check_storage(op, name, x)


def check_storage(op: str, name: str, x: Tensor) -> None:
    """All elements are in memory: a storage can be freed behind a tensor's back, and torch itself crashes then."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():  # wrapped tensors have none
        return
    if type(x) is not Tensor and type(x) is not torch.nn.Parameter:
        return
    held, needed = x.untyped_storage().nbytes(), x.storage_offset() * x.itemsize + x.nbytes
    if held < needed or not x.is_contiguous():
        last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
        needed = (x.storage_offset() + last + 1) * x.itemsize if x.numel() else 0
    if needed and not x.is_meta and x.data_ptr() == 0:  # as some of torch's own stand-ins
        held = 0
    if held < needed:
        raise ValueError(f"{op}: {name} must have a storage of {needed} bytes, got one of {held}")


def widest(tensors: Sequence[Tensor]) -> Tensor:
    """The first float64 tensor, or else the first: it says which backends can run them all."""
    return next((tensor for tensor in tensors if tensor.dtype == torch.float64), tensors[0])


def check_channels(op: str, x: Tensor) -> None:
    """`x` is `[N, C, ...]` with at least one channel and one value per channel."""
    if x.dim() < 2:
        raise ValueError(f"{op}: x must be [N, C, ...], got shape {tuple(x.shape)}")
    if x.numel() == 0:
        raise ValueError(f"{op}: x must have at least one value per channel, got shape {tuple(x.shape)}")


def check_per_channel(op: str, x: Tensor, **tensors: Tensor | None) -> None:
    """Each tensor is None or holds one number per channel on the device of `x`."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        check_float(op, name, tensor)
        if tensor.shape != (x.shape[1],):
            raise ValueError(f"{op}: {name} must have shape ({x.shape[1]},), got {tuple(tensor.shape)}")
        check_device(op, name, tensor, x)


def check_device(op: str, name: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.device != x.device:
        raise ValueError(f"{op}: {name} must be on {x.device}, where x is, got {tensor.device}")


def check_scalar(op: str, x: Tensor, **tensors: Tensor) -> None:
    """Each tensor holds one fp32 number (float64 too) on the device of `x`."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.numel() != 1:
            shape = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"{op}: {name} must be a tensor of one element, got {shape}")
        if tensor.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{op}: {name} must be float32, got {tensor.dtype}")
        check_device(op, name, tensor, x)
        check_storage(op, name, tensor)


def check_written(op: str, **tensors: Tensor | None) -> None:
    """Each tensor, which the operator writes to, is no part of a graph."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad:
            raise ValueError(f"{op}: {name} must not require a gradient where it is written to, got one that does")


def check_quant_range(op: str, quant_min: int, quant_max: int) -> None:
    for name, value in (("quant_min", quant_min), ("quant_max", quant_max)):
        if isinstance(value, bool) or not isinstance(value, int) or abs(value) > QUANT_LIMIT:
            raise ValueError(f"{op}: {name} must be an integer of at most 2^23 in magnitude, got {value!r}")
    if quant_min >= quant_max:
        raise ValueError(f"{op}: quant_max must be greater than quant_min {quant_min}, got {quant_max}")


def check_activation(op: str, activation: str | None) -> None:
    if activation not in (None, "relu", "relu6"):
        raise ValueError(f"{op}: activation must be None, 'relu' or 'relu6', got {activation!r}")


def check_fraction(op: str, name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{op}: {name} must be in [0, 1], got {value}")


def check_eps(op: str, eps: float) -> None:
    if not (math.isfinite(eps) and eps > 0):
        raise ValueError(f"{op}: eps must be finite and > 0, got {eps}")
