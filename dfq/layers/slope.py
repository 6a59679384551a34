"""The gradient of a function whose argument was rounded to a coarse grid."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Function = Callable[[Tensor], Tensor]


def with_mean_slope(function: Function, x: Tensor, scale: Tensor) -> Tensor:
    """`f(x)` of an `x` on a grid of step `s`. Its gradient is the mean slope over the step.

    That is `(f(x + s/2) - f(x - s/2)) / s`. The slope at `x` itself is that of the whole step only where the function
    is nearly straight over it. A gate whose inputs reach 10^5 has steps of 10^3: the sigmoid's slope at 0 is 1/4, and
    over the step it is 1/1000. Where one side is outside of the function's domain there is no slope.
    """
    result: Tensor = _Rounded.apply(x, scale.detach(), function)
    return result


class _Rounded(torch.autograd.Function):
    """See `with_mean_slope`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, function: Function) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.function = function
        return function(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        x, scale = ctx.saved_tensors
        half = scale.float() / 2  # and x in fp32: in bf16 the difference would have a digit or two
        rise = ctx.function(x.float() + half) - ctx.function(x.float() - half)
        slope = torch.nan_to_num(rise / scale, 0.0, 0.0, 0.0).to(x.dtype)
        return gradients[0] * slope, None, None
