"""The registry that conformance tests and benchmarks read: every operator's cases, tolerances and traffic."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dfq_kernels.dispatch import TABLE


@dataclass(frozen=True)
class Case:
    """One set of arguments of an operator.

    name: unique in its spec; make: seeded generator -> (tensors that may get gradients, keyword arguments).
    cases are built fresh for every call, because an operator may update its ranges in place.
    """

    name: str
    make: Callable[[torch.Generator], tuple[dict[str, Any], dict[str, Any]]]


@dataclass(frozen=True)
class OpSpec:
    """What a test or a benchmark must know of an operator.

    op: name in `dispatch.TABLE`; call: the public function;
    cases: every branch of the maths; exact: whether values are bit-equal to the reference (else `rtol`, `atol`);
    mutated: arguments that the call updates in place; bytes_moved: ideal traffic, forward and backward, per case;
    mutations: faults that some case must notice, as (text in reference.py, text that replaces it).
    """

    op: str
    call: Callable[..., Any]
    cases: tuple[Case, ...]
    bytes_moved: Callable[[dict[str, Any]], tuple[int, int]]
    exact: bool = True
    rtol: float = 0.0
    atol: float = 0.0
    mutated: tuple[str, ...] = ()
    mutations: tuple[tuple[str, str], ...] = field(default=())


def all_specs() -> dict[str, OpSpec]:
    """Every operator's spec, in the order of the dispatch table."""
    return {op: importlib.import_module(f"dfq_kernels.{op}.spec").SPEC for op in TABLE}


def randn(generator: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    """Normal values for a case."""
    return (torch.randn(*shape, generator=generator) * scale).to(dtype)


def nbytes(*tensors: Tensor) -> int:
    """Bytes of the tensors' values."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def layouts(x: Tensor) -> dict[str, Tensor]:
    """`x` as the memory layouts that users have: contiguous, channels-last, a slice, a transposed view, misaligned."""
    wide = torch.empty(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype)
    wide[..., ::2] = x
    offset = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape)
    offset.copy_(x)
    views = {"contiguous": x, "slice": wide[..., ::2], "misaligned": offset}
    if x.dim() == 4:
        views["channels_last"] = x.contiguous(memory_format=torch.channels_last)
        views["transposed"] = x.transpose(2, 3).contiguous().transpose(2, 3)
    return views
