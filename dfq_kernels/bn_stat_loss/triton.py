"""`bn_stat_loss` in Triton: one launch per layer, and one that adds the layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from dfq_kernels.bn_stat_loss import schema
from dfq_kernels.memory import fp32
from dfq_kernels.registration import register
from dfq_kernels.tiles import elements, launch


@triton.jit
def at_least(x, floor):
    """NaN stays NaN."""
    return tl.where(x < floor, floor, x)


@triton.jit
def forward_kernel(means, variances, running_means, running_vars, loss, channels, eps, BLOCK: tl.constexpr):
    # math     sum over channels of ((mean - m)^2 + var) / (2 v) - 0.5 log(var / v) - 0.5
    # traffic  four vectors read
    # grid     one program
    # order    blocks in order, lanes in fp32, folded in double
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, channels, BLOCK):
        c = start + tl.arange(0, BLOCK)
        there = c < channels
        var = at_least(tl.load(variances + c, mask=there, other=1.0), eps)
        stored = at_least(tl.load(running_vars + c, mask=there, other=1.0), eps)
        distance = tl.load(means + c, mask=there, other=0.0) - tl.load(running_means + c, mask=there, other=0.0)
        terms = (distance * distance + var) / (2 * stored) - 0.5 * tl.log(var / stored) - 0.5
        total += tl.where(there, terms, 0.0)
    tl.store(loss, tl.sum(total.to(tl.float64), 0).to(tl.float32))


@triton.jit
def backward_kernel(
    grad_out, means, variances, running_means, running_vars, grad_means, grad_vars, channels, eps, BLOCK: tl.constexpr
):
    # math     grad_mean = grad (mean - m) / v; grad_var = grad (1 / (2 v) - 1 / (2 var)), 0 where var is below eps
    # traffic  four vectors read, two written
    # grid     one program per BLOCK channels
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = c < channels
    grad = tl.load(grad_out)
    var = tl.load(variances + c, mask=there, other=1.0)
    stored = at_least(tl.load(running_vars + c, mask=there, other=1.0), eps)
    distance = tl.load(means + c, mask=there, other=0.0) - tl.load(running_means + c, mask=there, other=0.0)
    tl.store(grad_means + c, grad * distance / stored, mask=there)
    slope = 1 / (2 * stored) - 1 / (2 * at_least(var, eps))
    tl.store(grad_vars + c, tl.where(var >= eps, grad * slope, 0.0), mask=there)


@register(schema.FORWARD, "triton")
def forward(
    means: Sequence[Tensor],
    variances: Sequence[Tensor],
    running_means: Sequence[Tensor],
    running_vars: Sequence[Tensor],
    eps: Sequence[float],
) -> Tensor:
    """The sum over layers and channels."""
    losses = torch.empty(len(means), dtype=torch.float32, device=means[0].device)
    for layer, vectors in enumerate(zip(means, variances, running_means, running_vars, strict=True)):
        launch(
            forward_kernel, "finish", 1, losses, *[fp32(vector) for vector in vectors], losses[layer:],
            vectors[0].numel(), eps[layer], BLOCK=elements("finish"),
        )  # fmt: skip
    return losses.sum()


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
    block = elements("finish")
    for layer, vectors in enumerate(zip(means, variances, running_means, running_vars, strict=True)):
        channels = vectors[0].numel()
        launch(
            backward_kernel, "finish", triton.cdiv(channels, block), grad_out, grad_out,
            *[fp32(vector) for vector in vectors], grad_means[layer], grad_vars[layer], channels, eps[layer],
            BLOCK=block,
        )  # fmt: skip
    return grad_means, grad_vars
