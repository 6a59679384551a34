"""Which backend runs an operator: one table, one reason for every hole.

`backend=None` takes the first of the row that is there; an explicit name runs that backend or raises `BackendError`.
`DFQ_BACKEND`, read when the package is imported, replaces `None` for the whole process, for all operators that have it.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import torch

from dfq_kernels import extension
from dfq_kernels.memory import DTYPES

_BEST_FIRST: dict[str, tuple[str, ...]] = {"cuda": ("native", "triton", "reference"), "cpu": ("native", "reference")}
_INTEGERS: dict[str, tuple[str, ...]] = {"cuda": ("triton", "reference"), "cpu": ("native", "reference")}

# op -> device type -> backends, best first; a row changes only with a committed benchmark
TABLE: dict[str, dict[str, tuple[str, ...]]] = {
    "fake_quant": _BEST_FIRST,
    "observe_fake_quant": _BEST_FIRST,
    "fake_quant_weights": _BEST_FIRST,
    "bn_stats": _BEST_FIRST,
    "bn_act_stats": _BEST_FIRST,
    "bn_act_fake_quant": _BEST_FIRST,
    "bn_stat_loss": _BEST_FIRST,
    "fake_quant_conv2d": {"cuda": ("reference",), "cpu": ("native", "reference")},  # cuDNN's floats; integers
    "quantize": _INTEGERS,
    "requantize": _INTEGERS,
    "int_conv2d": _INTEGERS,
    "int_pool": _INTEGERS,
    "int_resize": _INTEGERS,
}
READS_INTEGERS = ("requantize", "int_conv2d", "int_pool", "int_resize")
_FOR_ALL = os.environ.get("DFQ_BACKEND")
BACKENDS = ("native", "triton", "reference")


class BackendError(RuntimeError):
    """The backend that was asked for is not there."""


@cache
def missing(op: str, backend: str, device_type: str, dtype: torch.dtype = torch.float32) -> str | None:
    """Why `backend` cannot run `op` on `device_type` with values of `dtype`; None if it can.

    The single source of the automatic choice, the error text, the test skips and the support matrix.
    """
    if backend not in BACKENDS:
        return f"no such backend; there are {', '.join(BACKENDS)}"
    if backend != "reference":
        if device_type not in TABLE[op]:
            return f"no kernels for device type {device_type}"
        if not written(op, backend, device_type):
            return f"there is no {backend} kernel for device type {device_type}"
        if backend == "triton" and device_type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            return "Triton runs on the CPU only interpreted (TRITON_INTERPRET=1)"
        if backend == "triton" and (reason := _no_triton()) is not None:
            return reason
        if backend == "native" and (reason := extension.missing(device_type)) is not None:
            return reason
        if op not in READS_INTEGERS and dtype not in DTYPES:
            return f"it runs float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    if device_type == "cuda" and not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return None


def written(op: str, backend: str, device_type: str) -> bool:
    """Whether the backend has a kernel of the operator. The CPU's rows leave out Triton, which is interpreted there."""
    rows = TABLE[op].values() if backend == "triton" else [TABLE[op].get(device_type, ())]
    return any(backend in names for names in rows)


@cache
def _no_triton() -> str | None:
    """Why Triton cannot be used; None if it can."""
    try:
        importlib.import_module("triton")
    except Exception as error:  # a broken install raises whatever it likes
        return f"Triton cannot be imported: {(str(error).splitlines() or [type(error).__name__])[0]}"
    return None


_LOADED: dict[tuple[str, str], ModuleType] = {}


@cache
def _choose(op: str, backend: str, device_type: str, dtype: torch.dtype) -> str:
    reason: str | None = None
    for name in TABLE[op].get(device_type, ("reference",)) if backend == "auto" else (backend,):
        reason = missing(op, name, device_type, dtype)
        if reason is None:
            if backend == "auto" and name != TABLE[op].get(device_type, (name,))[0]:
                _warn_of_a_module_that_is_not_there(op, name, device_type)
            _LOADED[op, name] = importlib.import_module(f"dfq_kernels.{op}.{name}")
            return name
    raise BackendError(f"{op}: backend must be one that runs on {device_type}, got {backend!r}: {reason}")


def _warn_of_a_module_that_is_not_there(op: str, name: str, device_type: str) -> None:
    """Once per operator, unless whoever built the module wanted it so."""
    reason = extension.missing(device_type) if "native" in TABLE[op][device_type] else None
    if reason is not None and "DFQ_BUILD_NATIVE" not in reason:
        warnings.warn(f"{op} runs as {name} on {device_type}: {reason}", RuntimeWarning, stacklevel=2)


def named(op: str, backend: str | None, device_type: str = "cpu") -> str | None:
    """The backend that was asked for, by the call or by `DFQ_BACKEND`; None: the choice is free."""
    return backend or (_FOR_ALL if _FOR_ALL not in BACKENDS or written(op, _FOR_ALL, device_type) else None)


def _name(op: str, backend: str | None, device_type: str, dtype: torch.dtype) -> str:
    return _choose(op, named(op, backend, device_type) or "auto", device_type, dtype)


# what torch.compiler.assume_constant_result does; but it imports the compiler, 1.7 seconds of every program's start
_name._dynamo_marked_constant = True  # type: ignore[attr-defined]


def chosen(op: str, device_type: str) -> str | None:
    """The backend that `backend=None` takes for fp32 values; None where `DFQ_BACKEND` names one that is not there."""
    try:
        return _name(op, None, device_type, torch.float32)
    except BackendError:
        return None


def whole_call(op: str, backend: str | None) -> Callable[..., Any] | None:
    """The native module's function that does a whole plain call of `op`; None where another backend is meant, or there
    is none. It gives (what the forward gives, whether autograd must record it), or None where the call is not plain."""
    return extension.whole_call(op) if (backend or _FOR_ALL or "native") == "native" else None


def left(op: str, backend: str) -> str | None:
    """The calls that this backend leaves to `reference` where the choice is free; None: none."""
    found: str | None = getattr(importlib.import_module(f"dfq_kernels.{op}.{backend}"), "LEAVES", None)
    return found


def resolve(op: str, backend: str | None, x: torch.Tensor, *call: Any) -> ModuleType:
    """The module that runs `op` on `x`: `forward`, `backward` and what else `dfq_kernels/<op>/reference.py` has.

    A backend's module may have `leaves(*call)`, which says whether it leaves a call to `reference` where the choice is
    free, and `LEAVES`, the same in words, for the support matrix.

    Raises:
        BackendError: an explicit backend that is not there; it never falls back.
    """
    device_type = "cpu" if x.is_cpu else x.device.type
    impl = _LOADED[op, _name(op, backend, device_type, x.dtype)]  # a name and a dict: torch.compile can trace both
    if call and named(op, backend, device_type) is None and hasattr(impl, "leaves") and impl.leaves(*call):
        return _LOADED[op, _name(op, "reference", device_type, x.dtype)]
    return impl
