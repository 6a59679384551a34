"""A stand-in for CUDA graphs on the CPU: records the operators of a step and runs them again on the same tensors.

As in a graph, Python does not run again: a number that a step took from Python stays what it was, and results land in
the tensors of the first time. As in graphs that share a pool of memory, a step's run may write over what another step
left in its results: here it always does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

HOST_READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default,
              torch.ops.aten.nonzero.default, torch.ops.aten.equal.default)  # fmt: skip
TO_HOST = ("cpu", "numpy", "tolist")  # on a CPU these are no operators


class ForbidHostReads(TorchDispatchMode):
    """Raises where a step reads values: `.item()`, `float(x)`, `bool(x)`, `.cpu()`, shapes made of values."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in HOST_READS:
            raise RuntimeError(f"{func} in a step: the host would wait for the device")
        return func(*args, **kwargs)

    def __enter__(self) -> Any:
        self.patches = [mock.patch.object(Tensor, name, self._refuse(name)) for name in TO_HOST]
        for patch in self.patches:
            patch.start()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        for patch in self.patches:
            patch.stop()
        super().__exit__(*error)

    @staticmethod
    def _refuse(name: str) -> Callable[[Tensor], Any]:
        def refuse(_: Tensor) -> Any:
            raise RuntimeError(f"Tensor.{name} in a step: the host would wait for the device")

        return refuse


class _Tape(ForbidHostReads):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.made: set[int] = set()  # addresses of the memory that the step allocated: a graph's pool

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if not func.is_view:
            self.calls.append((func, args, kwargs or {}, result))
            self.made |= _memory(result) - _memory((args, kwargs))
        return result

    def replay(self) -> None:
        for func, args, kwargs, result in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def _memory(tree: Any) -> set[int]:
    """Where the tensors of a tree lie."""
    return {leaf.untyped_storage().data_ptr() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)}


def _overwrite(result: Any, made: set[int]) -> None:
    """Other values in the results that lie in memory of the step's own."""
    for leaf in tree_leaves(result):
        if isinstance(leaf, Tensor) and _memory(leaf) <= made:
            leaf.detach().fill_(float("nan") if leaf.is_floating_point() else 1)


class RecordedSteps:
    """A `Recorder` for the CPU. A CUDA graph is recorded without running; what ran here is put back."""

    def __init__(self, changed: Callable[[], list[Tensor]]) -> None:
        """`changed`: every tensor that lives from step to step."""
        self.changed = changed
        self.results: list[tuple[Any, set[int]]] = []  # of every recorded step, and its memory

    def warm_up(self, function: Callable[[], Any]) -> Any:
        return function()

    def record(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        held = self.changed()
        before = [value.clone() for value in held]
        with torch.random.fork_rng(devices=()), _Tape() as tape:
            result = function()
        with torch.no_grad():
            for value, old in zip(held, before, strict=True):
                value.copy_(old)

        own = len(self.results)
        self.results.append((result, tape.made))

        def replay() -> None:
            with torch.no_grad():
                for index, other in enumerate(self.results):
                    if index != own:
                        _overwrite(*other)
                tape.replay()

        return replay, result
