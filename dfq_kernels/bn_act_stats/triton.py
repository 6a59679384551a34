"""`bn_act_stats` in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dfq_kernels.bn_act_stats import schema
from dfq_kernels.bn_stats.triton import moments_finish_kernel
from dfq_kernels.memory import ACTIVATIONS, dense, fp32, in_order_of, optional, view
from dfq_kernels.registration import register
from dfq_kernels.tiles import (
    Tiles,
    activate,
    behind_activation,
    channels_of,
    elements,
    finish,
    first_step,
    inverse_deviation,
    keep_moments,
    launch,
    narrow,
    of_channels,
    pivot_of,
    quotient,
    reciprocal,
    take,
    tile,
)


@triton.jit
def forward_kernel(
    x, weight, bias, running_mean, running_var, out, parts, outer, channels, inner, steps, slices, eps,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    R: tl.constexpr, W: tl.constexpr, BY_CHANNEL: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    # math     out = act((x - running_mean) * (weight / sqrt(running_var + eps)) + bias); moments of x
    # traffic  x read, out written
    # grid     units x slices; a program walks over its slice's tiles
    # order    lanes in fp32, tiles in order; lanes joined in fp32, slices by the next kernel
    unit, slice = tl.program_id(0) // slices, tl.program_id(0) % slices
    c = channels_of(unit, W, BY_CHANNEL)
    stored_mean = of_channels(running_mean, c, channels, 0.0, True)
    inv_std = inverse_deviation(of_channels(running_var, c, channels, 1.0, True), eps)
    factor = of_channels(weight, c, channels, 1.0, WEIGHT) * inv_std
    shift = of_channels(bias, c, channels, 0.0, BIAS)
    pivot = pivot_of(x, c, channels, inner)[None, :]
    count, mean, squares = tl.zeros((R, W), tl.float32), tl.zeros((R, W), tl.float32), tl.zeros((R, W), tl.float32)
    for step in range(first_step(slice, steps, slices), first_step(slice + 1, steps, slices)):
        offsets, there = tile(unit, step, outer, channels, inner, R, W, BY_CHANNEL, INDEX)
        values = tl.load(x + offsets, mask=there, other=0.0).to(tl.float32)
        y = activate((values - stored_mean) * factor + shift, ACTIVATION)
        tl.store(out + offsets, narrow(y, out.dtype.element_ty), mask=there)
        count, mean, squares = take(count, mean, squares, values - pivot, there)
    keep_moments(parts, slice, slices, c, channels, count, mean, squares, BY_CHANNEL)


@triton.jit
def backward_kernel(
    grad_out, grad_mean, grad_var, x, batch_mean, weight, bias, running_mean, running_var, grad_x,
    outer, channels, inner, steps, eps, count,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    R: tl.constexpr, W: tl.constexpr, BY_CHANNEL: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    # math     grad_x = act'(out) grad_out * factor + (x - batch_mean) (2 / count grad_var) + grad_mean / count
    # traffic  grad_out and x read, grad_x written
    # grid     units x steps: one tile a program
    # order    every operation rounded on its own
    unit, step = tl.program_id(0) // steps, tl.program_id(0) % steps
    c = channels_of(unit, W, BY_CHANNEL)
    inv_std = inverse_deviation(of_channels(running_var, c, channels, 1.0, True), eps)
    factor = of_channels(weight, c, channels, 1.0, WEIGHT) * inv_std
    slope = reciprocal(count) * 2.0 * of_channels(grad_var, c, channels, 0.0, True)
    shift = quotient(of_channels(grad_mean, c, channels, 0.0, True), count)
    offsets, there = tile(unit, step, outer, channels, inner, R, W, BY_CHANNEL, INDEX)
    values = tl.load(x + offsets, mask=there, other=0.0).to(tl.float32)
    grad = tl.load(grad_out + offsets, mask=there, other=0.0).to(tl.float32)
    if ACTIVATION > 0:
        y = (values - of_channels(running_mean, c, channels, 0.0, True)) * factor
        y = activate(y + of_channels(bias, c, channels, 0.0, BIAS), ACTIVATION)
        # the activation's gradient looks at what the forward stored
        grad = behind_activation(grad, narrow(y, x.dtype.element_ty).to(tl.float32), ACTIVATION)
    through_statistics = (values - of_channels(batch_mean, c, channels, 0.0, True)) * slope + shift
    tl.store(grad_x + offsets, narrow(grad * factor + through_statistics, grad_x.dtype.element_ty), mask=there)


@register(schema.FORWARD, "triton")
def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float, activation: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`(out, batch_mean, batch_var)`."""
    x, weight, bias, mean, var = dense(x), optional(weight), optional(bias), fp32(mean), fp32(var)
    out, batch_mean, batch_var = schema.allocate(x)
    tiles = Tiles.of(view(x, 1), elements("reduction"))
    parts = torch.empty(3, tiles.slices, tiles.channels, dtype=torch.float32, device=x.device)
    launch(
        forward_kernel, "reduction", tiles.units * tiles.slices, x, x, weight, bias, mean, var, out, parts, *tiles,
        tiles.slices, eps, WEIGHT=weight is not None, BIAS=bias is not None, ACTIVATION=ACTIVATIONS[activation],
        **tiles.shape,
    )  # fmt: skip
    finish(moments_finish_kernel, tiles, parts, x, batch_mean, batch_var, tiles.inner)
    return out, batch_mean, batch_var


@register(schema.BACKWARD, "triton")
def backward(
    grad_out: Tensor,
    grad_mean: Tensor,
    grad_var: Tensor,
    x: Tensor,
    batch_mean: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    activation: str | None,
) -> Tensor:
    """Both gradients of x joined: through the batch norm, and through the statistics."""
    x, weight, bias, mean, var = dense(x), optional(weight), optional(bias), fp32(mean), fp32(var)
    grad_out, grad_mean, grad_var = in_order_of(x, grad_out), fp32(grad_mean), fp32(grad_var)
    grad_x = torch.empty_like(x)
    tiles = Tiles.of(view(x, 1), elements("elementwise"))
    launch(
        backward_kernel, "elementwise", tiles.units * tiles.steps, x, grad_out, grad_mean, grad_var, x, batch_mean,
        weight, bias, mean, var, grad_x, *tiles, eps, float(x.numel() // tiles.channels), WEIGHT=weight is not None,
        BIAS=bias is not None, ACTIVATION=ACTIVATIONS[activation], **tiles.shape,
    )  # fmt: skip
    return grad_x
