"""The native module: loaded once, and the reason if it is not there.

The module knows no torch: a backend's `native.py` gives it addresses of dense tensors.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from dfq_kernels._eager import WATCHERS


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
        return f"the native module cannot be loaded: {(str(error).splitlines() or [type(error).__name__])[0]}"
    if device_type == "cuda" and not module.cuda:
        return f"the native module was built without CUDA kernels: {_note()}"
    return None


def built() -> str:
    """What the native module has, in a line: the first one of everything that shows an installation."""
    reason = missing("cpu")
    if reason is not None:
        return f"NO NATIVE KERNELS: {reason}"
    without = missing("cuda")
    return f"native kernels: CPU ({native().isa}); " + ("CUDA" if without is None else f"NO CUDA KERNELS: {without}")


def _note() -> str | None:
    """What the build left to say."""
    path = Path(__file__).parent / "_native.txt"
    return path.read_text().strip() if path.exists() else None


@cache
def calls() -> ModuleType | None:
    """The module's functions from tensors to tensors (csrc/call_bindings.cpp).

    None where torch does not let its tensors be read without its headers (before 2.10), or the module is not there.
    """
    table = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if table is None or missing("cpu") is not None:
        return None
    found = native().calls
    return found if found.attach(table, torch, vars(forward_ad), WATCHERS) else None


def whole_call(name: str) -> Callable[..., Any] | None:
    """The module's function of this name that does a whole plain call; None: there is none, or a compiler traces."""
    return None if torch.compiler.is_compiling() else getattr(calls(), name, None)


def address(values: Tensor | None) -> int:
    """Where the values are; 0 for None."""
    return 0 if values is None else values.data_ptr()


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
