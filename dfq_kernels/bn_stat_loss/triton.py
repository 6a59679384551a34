"""`bn_stat_loss` in Triton: one launch for all layers, forward or backward (one more for every 48 layers)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dfq_kernels.bn_stat_loss import schema
from dfq_kernels.layers import chunks, find_layer, of_layer
from dfq_kernels.memory import fp32
from dfq_kernels.registration import register
from dfq_kernels.tiles import elements, launch


@triton.jit
def at_least(x, floor):
    """NaN stays NaN."""
    return tl.where(x < floor, floor, x)


@triton.jit
def forward_kernel(
    means, variances, running_means, running_vars, losses, channels, eps, longest, L: tl.constexpr, BLOCK: tl.constexpr
):
    # math     sum over layers, channels of ((mean - m)^2 + var) / (2 v) - 0.5 log(var / v) - 0.5
    # traffic  four vectors read
    # grid     one program: a tile of L layers by BLOCK channels walks along the channels
    # order    blocks in order, places in fp32, folded in double
    layer = tl.arange(0, L)
    mean, var = of_layer(means, layer)[:, None], of_layer(variances, layer)[:, None]
    running_mean, running_var = of_layer(running_means, layer)[:, None], of_layer(running_vars, layer)[:, None]
    count, floor = of_layer(channels, layer)[:, None], of_layer(eps, layer)[:, None]
    total = tl.zeros((L, BLOCK), tl.float32)
    for start in range(0, longest, BLOCK):
        c = start + tl.arange(0, BLOCK)[None, :]
        there = (c < count) & (layer < len(means))[:, None]
        batch = at_least(tl.load(var + c, mask=there, other=1.0), floor)
        stored = at_least(tl.load(running_var + c, mask=there, other=1.0), floor)
        distance = tl.load(mean + c, mask=there, other=0.0) - tl.load(running_mean + c, mask=there, other=0.0)
        terms = (distance * distance + batch) / (2 * stored) - 0.5 * tl.log(batch / stored) - 0.5
        total += tl.where(there, terms, 0.0)
    tl.store(losses, tl.sum(tl.sum(total.to(tl.float64), 0), 0).to(tl.float32))


@triton.jit
def backward_kernel(
    grad_out, means, variances, running_means, running_vars, grad_means, grad_vars, channels, eps, ends,
    BLOCK: tl.constexpr,
):  # fmt: skip
    # math     grad_mean = grad (mean - m) / v; grad_var = grad (1 / (2 v) - 1 / (2 var)), 0 where var is below eps
    # traffic  four vectors read, two written
    # grid     one program per BLOCK channels of a layer
    layer, begin = find_layer(ends, tl.program_id(0))
    c = (tl.program_id(0) - begin) * BLOCK + tl.arange(0, BLOCK)
    there, floor = c < of_layer(channels, layer), of_layer(eps, layer)
    grad = tl.load(grad_out)
    var = tl.load(of_layer(variances, layer) + c, mask=there, other=1.0)
    stored = at_least(tl.load(of_layer(running_vars, layer) + c, mask=there, other=1.0), floor)
    mean = tl.load(of_layer(means, layer) + c, mask=there, other=0.0)
    distance = mean - tl.load(of_layer(running_means, layer) + c, mask=there, other=0.0)
    tl.store(of_layer(grad_means, layer) + c, grad * distance / stored, mask=there)
    slope = 1 / (2 * stored) - 1 / (2 * at_least(var, floor))
    tl.store(of_layer(grad_vars, layer) + c, tl.where(var >= floor, grad * slope, 0.0), mask=there)


def _launches(lists: Sequence[Sequence[Tensor]], eps: Sequence[float]) -> Iterator[tuple[Any, ...]]:
    """Per launch the layers' vectors, list by list, their numbers of channels and their floors."""
    layers = list(zip(*[[fp32(vector) for vector in vectors] for vectors in lists], eps, strict=True))
    for chunk in chunks(layers):
        *vectors, floors = zip(*chunk, strict=True)
        yield vectors, tuple(vector.numel() for vector in vectors[0]), floors


@register(schema.FORWARD, "triton")
def forward(
    means: Sequence[Tensor],
    variances: Sequence[Tensor],
    running_means: Sequence[Tensor],
    running_vars: Sequence[Tensor],
    eps: Sequence[float],
) -> Tensor:
    """The sum over layers and channels."""
    parts = []
    for vectors, channels, floors in _launches((means, variances, running_means, running_vars), eps):
        parts.append(schema.allocate(means))
        rows, longest = triton.next_power_of_2(len(channels)), max(1, *channels)
        block = min(max(1, elements("finish") // rows), triton.next_power_of_2(longest))
        launch(
            forward_kernel, "finish", 1, parts[-1], *vectors, parts[-1], channels, floors, longest, L=rows, BLOCK=block,
        )  # fmt: skip
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum()


@register(schema.BACKWARD, "triton")
def backward(
    grad_out: Tensor,
    means: Sequence[Tensor],
    variances: Sequence[Tensor],
    running_means: Sequence[Tensor],
    running_vars: Sequence[Tensor],
    eps: Sequence[float],
) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of every batch mean and variance."""
    grad_out = fp32(grad_out)
    grad_means, grad_vars = schema.allocate_grads(grad_out, means)
    lists = (means, variances, running_means, running_vars, grad_means, grad_vars)
    for vectors, channels, floors in _launches(lists, eps):
        block = min(elements("finish"), triton.next_power_of_2(max(1, *channels)))
        ends = tuple(accumulate(max(1, triton.cdiv(count, block)) for count in channels))
        launch(
            backward_kernel, "finish", ends[-1], grad_out, grad_out, *vectors, channels, floors, ends, BLOCK=block,
        )  # fmt: skip
    return grad_means, grad_vars
