"""`fake_quant` in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dfq_kernels.fake_quant import schema
from dfq_kernels.memory import dense, fp32, in_order_of, mask_like, shaped, view
from dfq_kernels.registration import register
from dfq_kernels.tiles import (
    Tiles,
    channels_of,
    elements,
    finish,
    first_step,
    fold,
    keep_part,
    launch,
    learned_gradient,
    narrow,
    of_channels,
    reciprocal,
    round_to,
    tile,
    total_of,
    wide,
)


@triton.jit
def quantize_kernel(
    x, scales, zero_points, out, mask, size, channels, inner, quant_min, quant_max,
    BLOCK: tl.constexpr, PER_CHANNEL: tl.constexpr, WIDE: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    # math     q = clamp(rne(x * inv + zero_point)); out = (q - zero_point) * scale; inv = 1 / scale
    # traffic  x read, out written, one bit per element
    # grid     one program per BLOCK elements of memory order
    # order    every operation rounded on its own
    start = tl.program_id(0).to(tl.int64) * BLOCK
    at = tl.arange(0, BLOCK)
    there = start + at < size
    values = tl.load(x + start + at, mask=there, other=0.0).to(tl.float32)
    if PER_CHANNEL:
        row = start // inner
        c = ((row % channels).to(INDEX) + (at + (start - row * inner).to(INDEX)) // inner) % channels
        scale, zero_point = tl.load(scales + c), tl.load(zero_points + c)
    else:
        scale, zero_point = tl.load(scales), tl.load(zero_points)
    rounded, q = round_to(values * reciprocal(scale) + zero_point, quant_min, quant_max, WIDE)
    tl.store(out + start + at, narrow((q - zero_point) * scale, out.dtype.element_ty), mask=there)
    inside = tl.reshape(((q == rounded) & there).to(tl.int32), (BLOCK // 8, 8))
    bits = tl.sum(inside << tl.arange(0, 8)[None, :], 1).to(tl.uint8)
    group = start // 8 + tl.arange(0, BLOCK // 8)
    tl.store(mask + group, bits, mask=group // 2 * 16 < size)  # whole pairs of bytes


@triton.jit
def masked_kernel(grad_out, mask, grad_x, size, BLOCK: tl.constexpr):
    # math     grad_x = grad_out where the bit is set, else 0
    # traffic  grad_out and bits read, grad_x written
    # grid     one program per BLOCK elements of memory order
    group = tl.program_id(0).to(tl.int64) * (BLOCK // 8) + tl.arange(0, BLOCK // 8)  # a byte, eight elements
    at = group[:, None] * 8 + tl.arange(0, 8)[None, :]
    bits = tl.load(mask + group, mask=group * 8 < size, other=0).to(tl.int32)[:, None]
    grad = tl.load(grad_out + at, mask=at < size, other=0.0)
    tl.store(grad_x + at, tl.where((bits >> tl.arange(0, 8)[None, :]) & 1 == 1, grad, 0.0), mask=at < size)


@triton.jit
def learned_kernel(
    grad_out, x, scales, zero_points, grad_x, parts, outer, channels, inner, steps, slices, quant_min, quant_max,
    WIDE: tl.constexpr, R: tl.constexpr, W: tl.constexpr, BY_CHANNEL: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    # math     LSQ eq. 3: grad_x, and the sums that grad_scale and grad_zero_point are made of
    # traffic  grad_out and x read, grad_x written
    # grid     units x slices; a program walks over its slice's tiles
    # order    lanes in fp32, tiles in order; lanes folded in fp32, slices in double by the next kernel
    unit, slice = tl.program_id(0) // slices, tl.program_id(0) % slices
    c = channels_of(unit, W, BY_CHANNEL)
    inv = reciprocal(of_channels(scales, c, channels, 1.0, True))
    zero_point = of_channels(zero_points, c, channels, 0.0, True)
    grad_scale, outside = tl.zeros((R, W), tl.float32), tl.zeros((R, W), tl.float32)
    for step in range(first_step(slice, steps, slices), first_step(slice + 1, steps, slices)):
        offsets, there = tile(unit, step, outer, channels, inner, R, W, BY_CHANNEL, INDEX)
        values = tl.load(x + offsets, mask=there, other=0.0).to(tl.float32)
        grad = tl.load(grad_out + offsets, mask=there, other=0.0).to(tl.float32)
        inside, of_scale, clipped = learned_gradient(values, grad, inv, zero_point, quant_min, quant_max, WIDE)
        tl.store(grad_x + offsets, narrow(inside, grad_x.dtype.element_ty), mask=there)
        grad_scale += tl.where(there, of_scale, 0.0)
        outside += tl.where(there, clipped, 0.0)
    keep_part(parts, 0, slice, slices, c, channels, fold(grad_scale, BY_CHANNEL))
    keep_part(parts, 1, slice, slices, c, channels, fold(outside, BY_CHANNEL))


@triton.jit
def learned_finish_kernel(
    parts, scales, grad_scale, grad_zero_point, channels, slices, S: tl.constexpr, BLOCK: tl.constexpr
):
    # math     grad_scale: the sum of part 0; grad_zero_point: of part 1, times -scale
    # traffic  parts read
    # grid     one program per BLOCK channels
    # order    slices in double, in a fixed order
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = c < channels
    outside = total_of(parts, 1, slices, c, channels, S)
    tl.store(grad_scale + c, total_of(parts, 0, slices, c, channels, S), mask=there)
    tl.store(grad_zero_point + c, -outside * tl.load(scales + c, mask=there, other=0.0), mask=there)


@register(schema.FORWARD, "triton")
def forward(
    x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, axis: int | None
) -> tuple[Tensor, Tensor]:
    """`(out, inside)`; `inside` has one bit per element, in the memory order of `out`."""
    x, scale, zero_point = dense(x), fp32(scale), fp32(zero_point)
    out, mask = torch.empty_like(x), mask_like(x)
    size, channels, inner = view(x, axis)
    block = elements("elementwise")
    launch(
        quantize_kernel, "elementwise", triton.cdiv(size, block), x, x, scale, zero_point, out, mask, size, channels,
        inner, float(quant_min), float(quant_max), BLOCK=block, PER_CHANNEL=channels > 1,
        WIDE=wide(quant_min, quant_max),
        INDEX=tl.int32 if inner < 2**30 else tl.int64,
    )  # fmt: skip
    return out, mask


@register(schema.MASK_BACKWARD, "triton")
def _mask_backward(grad_out: Tensor, inside: Tensor, size: list[int], stride: list[int]) -> Tensor:
    grad_x = torch.empty_strided(size, stride, dtype=grad_out.dtype, device=grad_out.device)
    grad_out, block = in_order_of(grad_x, grad_out), elements("elementwise")
    programs = triton.cdiv(grad_x.numel(), block)
    launch(masked_kernel, "elementwise", programs, grad_x, grad_out, inside, grad_x, grad_x.numel(), BLOCK=block)
    return grad_x


def backward(grad_out: Tensor, inside: Tensor, stride: tuple[int, ...]) -> Tensor:
    """The gradient of x where the scale is given; `stride`: of the forward's `out`."""
    return _mask_backward(grad_out, inside, grad_out.shape, stride)


@register(schema.BACKWARD, "triton")
def backward_learned(
    grad_out: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, axis: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, scale and zero_point."""
    x, scales, zero_points = dense(x), fp32(scale), fp32(zero_point)
    grad_out, grad_x = in_order_of(x, grad_out), torch.empty_like(x)
    tiles = Tiles.of(view(x, axis), elements("reduction"))
    parts = torch.empty(2, tiles.slices, tiles.channels, dtype=torch.float32, device=x.device)
    grads = torch.empty(tiles.channels, dtype=torch.float32, device=x.device)
    grad_scale, grad_zero_point = grads, torch.empty_like(grads)
    launch(
        learned_kernel, "reduction", tiles.units * tiles.slices, x, grad_out, x, scales, zero_points, grad_x, parts,
        *tiles, tiles.slices, float(quant_min), float(quant_max), WIDE=wide(quant_min, quant_max), **tiles.shape,
    )  # fmt: skip
    finish(learned_finish_kernel, tiles, parts, scales, grad_scale, grad_zero_point)
    return (
        grad_x,
        shaped(grad_scale, scale).to(scale.dtype),
        shaped(grad_zero_point, zero_point).to(zero_point.dtype),
    )
