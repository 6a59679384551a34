"""Whether a call is plain eager execution, which needs neither torch's dispatcher nor a node in its graph.

Both cost more than small tensors do: measured on 4,096 elements, 3 us and 5 us of 18, and three times that where the
caches are cold, as they are behind every large tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

# whose answers are false while nobody watches what is called: modes, transforms, tracing, the profiler
WATCHERS = (
    torch._C._len_torch_dispatch_stack,
    torch._C._are_functorch_transforms_active,
    torch._C._get_tracing_state,
    torch._C._autograd._profiler_enabled,
)


def plain(x: Tensor) -> bool:
    """Nobody watches, nothing is compiled, and x is no subclass of Tensor."""
    if torch.compiler.is_compiling() or type(x) not in (Tensor, torch.nn.Parameter):
        return False
    for watches in WATCHERS:  # noqa: SIM110  a generator costs as much as the answers
        if watches():
            return False
    return True


def recorded(*tensors: Tensor | None) -> bool:
    """Whether the call must go through `autograd.Function`: a tensor has a gradient, or who watches would miss it."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return forward_ad._current_level >= 0 or not plain(next(tensor for tensor in tensors if tensor is not None))


def once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """`once_differentiable`, which costs as much as a small kernel, only where a second derivative is recorded."""
    guarded = once_differentiable(backward)

    def call(ctx: Any, *grads: Tensor) -> Any:
        return (guarded if torch.is_grad_enabled() else backward)(ctx, *grads)

    return call
