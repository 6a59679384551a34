"""The registry that conformance tests and benchmarks read: every operator's cases, tolerances and traffic."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dfq_kernels.dispatch import TABLE

Make = Callable[[torch.Generator], tuple[dict[str, Any], dict[str, Any]]]


@dataclass(frozen=True)
class Case:
    """One set of arguments of an operator.

    name: unique in its spec; make: seeded generator -> (tensors, keyword arguments), fresh at every call, because an
    operator may update its ranges in place; gradients: whether gradients are compared (not where values are NaN).
    """

    name: str
    make: Make
    gradients: bool = True


@dataclass(frozen=True)
class OpSpec:
    """What a test or a benchmark must know of an operator.

    op: name in `dispatch.TABLE`; call: the public function, tensors and keywords by name;
    differentiable: tensors that get gradients; cases: every branch of the maths;
    bytes_moved: ideal traffic of a case's (tensors, keyword arguments), forward and backward;
    exact: values bit-equal between backends, else within `rtol` and `atol`; mutated: tensors updated in place;
    mutations: faults that some test must notice, as (text in reference.py, text that replaces it).
    """

    op: str
    call: Callable[..., Any]
    differentiable: tuple[str, ...]
    cases: tuple[Case, ...]
    bytes_moved: Callable[[dict[str, Any], dict[str, Any]], tuple[int, int]]
    exact: bool = True
    rtol: float = 0.0
    atol: float = 0.0
    mutated: tuple[str, ...] = ()
    mutations: tuple[tuple[str, str], ...] = field(default=())


def all_specs() -> dict[str, OpSpec]:
    """Every operator's spec, in the order of the dispatch table."""
    return {op: importlib.import_module(f"dfq_kernels.{op}.spec").SPEC for op in TABLE}


# --- parts of cases ---------------------------------------------------------------------------------------------


def randn(generator: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    """Normal values."""
    return (torch.randn(*shape, generator=generator) * scale).to(dtype)


def nbytes(*tensors: Tensor) -> int:
    """Bytes of the tensors' values."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def fresh_range(low: float = float("inf"), high: float = float("-inf"), scale: float = 1.0) -> dict[str, Tensor]:
    """A moving range and its parameters; by default one that has seen nothing."""
    values = {"running_min": low, "running_max": high, "scale": scale, "zero_point": 0.0}
    return {name: torch.tensor(value) for name, value in values.items()}


def batch_norm(generator: torch.Generator, channels: int) -> dict[str, Any]:
    """Parameters and stored statistics."""
    return {
        "weight": randn(generator, channels),
        "bias": randn(generator, channels),
        "running_mean": randn(generator, channels),
        "running_var": randn(generator, channels).square() + 0.1,
    }


def mask_bytes(x: Tensor) -> int:
    """One bit per element: what a backward needs of a clamp."""
    return x.numel() // 8


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "slice": lambda x: torch.stack([x, x], dim=-1).flatten(-2)[..., ::2],
    "misaligned": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    "expanded": lambda x: x[:, :, :, :1].expand(*x.shape[:3], 5),
}


def layout_cases(arguments: Callable[[Tensor], tuple[dict[str, Any], dict[str, Any]]]) -> tuple[Case, ...]:
    """One case per memory layout that users have; `arguments` puts the tensor into the call."""

    def make_with(view: Callable[[Tensor], Tensor]) -> Make:
        return lambda generator: arguments(view(randn(generator, 3, 5, 7, 11)))

    return tuple(Case(name, make_with(view)) for name, view in LAYOUTS.items())
