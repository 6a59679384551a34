"""The native module: loaded once, the reason if it is not there, and what calls of it share.

The module knows no torch. A backend's `native.py` gives it addresses of dense tensors and a view: `(size, channels,
inner)`, element i in memory order belonging to channel `i // inner % channels`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from dfq_kernels._eager import plain

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ACTIVATIONS = {None: 0, "relu": 1, "relu6": 2}
_LIBRARY = torch.library.Library("dfq_kernels", "DEF")


@cache
def native() -> ModuleType:
    """The module, or an ImportError. torch is loaded by now: the kernels run on its threads."""
    return importlib.import_module("dfq_kernels._native")


@cache
def missing(device_type: str) -> str | None:
    """Why native kernels cannot run on this device; None if they can."""
    try:
        module = native()
    except ImportError as error:
        if (note := _note()) is not None:
            return f"the native module was not built: {note}"
        return f"the native module cannot be loaded: {str(error).splitlines()[0]}"
    if device_type == "cuda" and not module.cuda:
        return f"the native module was built without CUDA kernels: {_note()}"
    return None


def _note() -> str | None:
    """What the build left to say."""
    path = Path(__file__).parent / "_native.txt"
    return path.read_text().strip() if path.exists() else None


def register(schema: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Defines `dfq_kernels::<schema>`, with what it does on CPU and GPU and, for tracing, on tensors without values.

    The first argument is a tensor, or a list of them; plain eager calls do not go through the dispatcher.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        name = schema.partition("(")[0]
        _LIBRARY.define(schema)
        for device in ("CPU", "CUDA"):
            _LIBRARY.impl(name, function, device)
        torch.library.register_fake(f"dfq_kernels::{name}", fake, lib=_LIBRARY)
        operator = getattr(torch.ops.dfq_kernels, name).default

        def call(first: Any, *rest: Any) -> Any:
            return (function if plain(first) else operator)(first, *rest)

        return call

    return decorate


# --- tensors for the module ---------------------------------------------------------------------------------------


def dense(x: Tensor) -> Tensor:
    """`x`, or a copy of it, whose elements fill their memory without gaps or overlaps."""
    if x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)):
        return x
    if torch.ops.aten.is_non_overlapping_and_dense(x):
        return x
    return x.clone(memory_format=torch.preserve_format)


def view(x: Tensor, axis: int | None) -> tuple[int, int, int]:
    """`(size, channels, inner)` of a dense tensor."""
    size = x.numel()
    if axis is None or x.shape[axis] == 1:
        return size, 1, size
    return size, x.shape[axis], x.stride(axis)


def in_order_of(x: Tensor, other: Tensor) -> Tensor:
    """`other` with the type and the memory order of the dense `x`."""
    if other.stride() == x.stride() and other.dtype == x.dtype:
        return other
    return torch.empty_like(x).copy_(other)


def fp32(values: Tensor) -> Tensor:
    """Contiguous fp32."""
    return values if values.dtype == torch.float32 and values.is_contiguous() else values.float().contiguous()


def address(values: Tensor | None) -> int:
    """Where the values are; 0 for None."""
    return 0 if values is None else values.data_ptr()


class Updated:
    """fp32 copies of tensors that a kernel updates, where they are not fp32 themselves; written back by `done`."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = tensors
        self.values = [fp32(tensor) for tensor in tensors]

    def done(self) -> None:
        for tensor, value in zip(self.tensors, self.values, strict=True):
            if value.data_ptr() != tensor.data_ptr():
                tensor.copy_(value)


def workspace(x: Tensor, view: tuple[int, int, int]) -> Tensor | None:
    """Room for the sums of a GPU's blocks; None on the CPU, whose kernels have their own."""
    if not (x.is_cuda or native().emulated):
        return None
    return torch.empty(native().workspace_bytes(*view), dtype=torch.uint8, device=x.device)


def where(x: Tensor, room: Tensor | None = None) -> tuple[int, int, int, int]:
    """Where a kernel on `x` runs: device (-1: CPU), threads, stream, workspace. Kernels are queued, not waited for."""
    if x.is_cuda:
        return x.device.index, 0, torch.cuda.current_stream(x.device).cuda_stream, address(room)
    return (0 if native().emulated else -1), torch.get_num_threads(), 0, address(room)


def optional(values: Tensor | None) -> Tensor | None:
    """`fp32` of what may be None."""
    return None if values is None else fp32(values)


def shaped(values: Tensor, other: Tensor) -> Tensor:
    """`values` in the shape of `other`."""
    return values if values.shape == other.shape else values.reshape(other.shape)


def mask_like(x: Tensor) -> Tensor:
    """Room for one bit per element, in whole pairs of bytes."""
    return x.new_empty((x.numel() + 15) // 16 * 2, dtype=torch.uint8)
