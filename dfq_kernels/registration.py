"""Operators of a backend as torch operators: tracing, autocast and `torch.compile` see one node each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from dfq_kernels._eager import plain

_LIBRARY = torch.library.Library("dfq_kernels", "DEF")


class Schema(NamedTuple):
    """What every backend of an operator's forward or backward has: its name, arguments and results in torch's schema
    language, and what it gives on tensors without values."""

    name: str
    arguments: str
    fake: Callable[..., Any]


def register(schema: Schema, backend: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Defines `dfq_kernels::<name>_<backend>`, with what it does on CPU and GPU and on tensors without values.

    The first argument is a tensor, or a list of them; plain eager calls on a tensor do not go through the dispatcher.
    """
    name = f"{schema.name}_{backend}"

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        _LIBRARY.define(name + schema.arguments)
        for device in ("CPU", "CUDA"):
            _LIBRARY.impl(name, function, device)
        torch.library.register_fake(f"dfq_kernels::{name}", schema.fake, lib=_LIBRARY)
        operator = getattr(torch.ops.dfq_kernels, name).default

        def call(first: Any, *rest: Any) -> Any:
            return (function if plain(first) else operator)(first, *rest)

        return call

    return decorate
