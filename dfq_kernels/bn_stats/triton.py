"""`bn_stats` in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dfq_kernels.bn_stats import schema
from dfq_kernels.memory import dense, fp32, view
from dfq_kernels.registration import register
from dfq_kernels.tiles import (
    Tiles,
    channels_of,
    elements,
    finish,
    first_step,
    keep_moments,
    launch,
    moments_of,
    narrow,
    of_channels,
    pivot_of,
    quotient,
    reciprocal,
    take,
    tile,
)


@triton.jit
def moments_kernel(
    x, parts, outer, channels, inner, steps, slices,
    R: tl.constexpr, W: tl.constexpr, BY_CHANNEL: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    # math     count, mean and squared deviations of every slice, about the channel's first element
    # traffic  x read
    # grid     units x slices; a program walks over its slice's tiles
    # order    lanes in fp32, tiles in order; lanes joined in fp32, slices by the next kernel
    unit, slice = tl.program_id(0) // slices, tl.program_id(0) % slices
    c = channels_of(unit, W, BY_CHANNEL)
    pivot = pivot_of(x, c, channels, inner)[None, :]
    count, mean, squares = tl.zeros((R, W), tl.float32), tl.zeros((R, W), tl.float32), tl.zeros((R, W), tl.float32)
    for step in range(first_step(slice, steps, slices), first_step(slice + 1, steps, slices)):
        offsets, there = tile(unit, step, outer, channels, inner, R, W, BY_CHANNEL, INDEX)
        values = tl.load(x + offsets, mask=there, other=0.0).to(tl.float32) - pivot
        count, mean, squares = take(count, mean, squares, values, there)
    keep_moments(parts, slice, slices, c, channels, count, mean, squares, BY_CHANNEL)


@triton.jit
def moments_finish_kernel(parts, x, mean, var, inner, channels, slices, S: tl.constexpr, BLOCK: tl.constexpr):
    # math     mean and biased variance of every channel
    # traffic  parts read
    # grid     one program per BLOCK channels
    # order    slices in a fixed order
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    distance, variance = moments_of(parts, slices, c, channels, S)
    tl.store(mean + c, pivot_of(x, c, channels, inner) + distance, mask=c < channels)
    tl.store(var + c, variance, mask=c < channels)


@triton.jit
def backward_kernel(
    grad_mean, grad_var, x, mean, grad_x, outer, channels, inner, steps, count,
    R: tl.constexpr, W: tl.constexpr, BY_CHANNEL: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    # math     grad_x = (x - mean) (2 / count grad_var) + grad_mean / count
    # traffic  x read, grad_x written
    # grid     units x steps: one tile a program
    # order    every operation rounded on its own
    unit, step = tl.program_id(0) // steps, tl.program_id(0) % steps
    c = channels_of(unit, W, BY_CHANNEL)
    slope = reciprocal(count) * 2.0 * of_channels(grad_var, c, channels, 0.0, True)
    shift = quotient(of_channels(grad_mean, c, channels, 0.0, True), count)
    offsets, there = tile(unit, step, outer, channels, inner, R, W, BY_CHANNEL, INDEX)
    centred = tl.load(x + offsets, mask=there, other=0.0).to(tl.float32) - of_channels(mean, c, channels, 0.0, True)
    tl.store(grad_x + offsets, narrow(centred * slope + shift, grad_x.dtype.element_ty), mask=there)


@register(schema.FORWARD, "triton")
def forward(x: Tensor) -> tuple[Tensor, Tensor]:
    """`(mean, var)`."""
    x = dense(x)
    mean, var = schema.allocate(x)
    tiles = Tiles.of(view(x, 1), elements("reduction"))
    parts = torch.empty(3, tiles.slices, tiles.channels, dtype=torch.float32, device=x.device)
    launch(moments_kernel, "reduction", tiles.units * tiles.slices, x, x, parts, *tiles, tiles.slices, **tiles.shape)
    finish(moments_finish_kernel, tiles, parts, x, mean, var, tiles.inner)
    return mean, var


@register(schema.BACKWARD, "triton")
def backward(grad_mean: Tensor, grad_var: Tensor, x: Tensor, mean: Tensor) -> Tensor:
    """`(grad_mean + 2 (x - mean) grad_var) / count` per element."""
    x, grad_mean, grad_var = dense(x), fp32(grad_mean), fp32(grad_var)
    grad_x = torch.empty_like(x)
    tiles = Tiles.of(view(x, 1), elements("elementwise"))
    launch(
        backward_kernel, "elementwise", tiles.units * tiles.steps, x, grad_mean, grad_var, x, mean, grad_x, *tiles,
        float(x.numel() // tiles.channels), **tiles.shape,
    )  # fmt: skip
    return grad_x
