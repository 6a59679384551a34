"""`bn_act_fake_quant` in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dfq_kernels.bn_act_fake_quant import schema
from dfq_kernels.memory import ACTIVATIONS, Updated, dense, fp32, in_order_of, optional, view
from dfq_kernels.observe_fake_quant.triton import move_range
from dfq_kernels.registration import register
from dfq_kernels.tiles import (
    Tiles,
    activate,
    behind_activation,
    channels_of,
    elements,
    finish,
    first_step,
    fold,
    fold_least,
    fold_most,
    inverse_deviation,
    keep_moments,
    keep_part,
    launch,
    learned_gradient,
    least,
    least_of,
    moments_of,
    most,
    most_of,
    narrow,
    of_channels,
    parts_of,
    pivot_of,
    quotient,
    reciprocal,
    round_to,
    take,
    tile,
    total_of,
    wide,
)


@triton.jit
def look_kernel(
    x, parts, outer, channels, inner, steps, slices,
    TRAINING: tl.constexpr, OBSERVE: tl.constexpr,
    R: tl.constexpr, W: tl.constexpr, BY_CHANNEL: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    # math     moments of x if training, least and largest x of every channel if observed
    # traffic  x read
    # grid     units x slices; a program walks over its slice's tiles
    # order    lanes in fp32, tiles in order; lanes joined in fp32, slices by the next kernel
    unit, slice = tl.program_id(0) // slices, tl.program_id(0) % slices
    c = channels_of(unit, W, BY_CHANNEL)
    pivot = pivot_of(x, c, channels, inner)[None, :]
    count, mean, squares = tl.zeros((R, W), tl.float32), tl.zeros((R, W), tl.float32), tl.zeros((R, W), tl.float32)
    low, high = tl.full((R, W), float("inf"), tl.float32), tl.full((R, W), float("-inf"), tl.float32)
    for step in range(first_step(slice, steps, slices), first_step(slice + 1, steps, slices)):
        offsets, there = tile(unit, step, outer, channels, inner, R, W, BY_CHANNEL, INDEX)
        values = tl.load(x + offsets, mask=there, other=0.0).to(tl.float32)
        if TRAINING:
            count, mean, squares = take(count, mean, squares, values - pivot, there)
        if OBSERVE:
            low = tl.where(there, least(low, values), low)
            high = tl.where(there, most(high, values), high)
    if TRAINING:
        keep_moments(parts, slice, slices, c, channels, count, mean, squares, BY_CHANNEL)
    if OBSERVE:
        keep_part(parts, 3, slice, slices, c, channels, fold_least(low, BY_CHANNEL))
        keep_part(parts, 4, slice, slices, c, channels, fold_most(high, BY_CHANNEL))


@triton.jit
def look_finish_kernel(
    parts, x, weight, bias, running_mean, running_var, mean, var, extremes, inner, momentum, unbiased, eps,
    channels, slices, TRAINING: tl.constexpr, OBSERVE: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr, S: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # math     mean, var; stored statistics move by momentum; a batch norm is monotone per channel, so the extremes of x
    #          give those of its output
    # traffic  parts read
    # grid     one program per BLOCK channels
    # order    slices in a fixed order
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = c < channels
    if TRAINING:
        distance, variance = moments_of(parts, slices, c, channels, S)
        average = pivot_of(x, c, channels, inner) + distance
        tl.store(mean + c, average, mask=there)
        tl.store(var + c, variance, mask=there)
        stored_mean = tl.load(running_mean + c, mask=there, other=0.0)
        stored_var = tl.load(running_var + c, mask=there, other=0.0)
        tl.store(running_mean + c, stored_mean + momentum * (average - stored_mean), mask=there)
        tl.store(running_var + c, stored_var + momentum * (variance * unbiased - stored_var), mask=there)
    else:
        average = tl.load(running_mean + c, mask=there, other=0.0)
        variance = tl.load(running_var + c, mask=there, other=1.0)
    if OBSERVE:
        factor = tl.sum(of_channels(weight, c, channels, 1.0, WEIGHT), 0) * inverse_deviation(variance, eps)
        shift = tl.sum(of_channels(bias, c, channels, 0.0, BIAS), 0)
        low = least_of(parts_of(parts, 3, slices, c, channels, S, float("inf")))
        high = most_of(parts_of(parts, 4, slices, c, channels, S, float("-inf")))
        one = activate((low - average) * factor + shift, ACTIVATION)
        other = activate((high - average) * factor + shift, ACTIVATION)
        tl.store(extremes + c, least(one, other), mask=there)
        tl.store(extremes + channels + c, most(one, other), mask=there)


@triton.jit
def quantize_kernel(
    x, weight, bias, mean, var, scale, zero_point, out, kept_mean, kept_var, used, outer, channels, inner, steps, eps,
    quant_min, quant_max,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr, ACTIVATION: tl.constexpr, WIDE: tl.constexpr,
    R: tl.constexpr, W: tl.constexpr, BY_CHANNEL: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    # math     out = fake_quant(act((x - mean) * (weight / sqrt(var + eps)) + bias))
    # traffic  x read, out written; copies of statistics (where they are stored ones) and of scale and zero point
    # grid     units x steps: one tile a program
    # order    every operation rounded on its own
    unit, step = tl.program_id(0) // steps, tl.program_id(0) % steps
    c = channels_of(unit, W, BY_CHANNEL)
    average, variance = of_channels(mean, c, channels, 0.0, True), of_channels(var, c, channels, 1.0, True)
    inv_std = inverse_deviation(variance, eps)
    factor = of_channels(weight, c, channels, 1.0, WEIGHT) * inv_std
    offsets, there = tile(unit, step, outer, channels, inner, R, W, BY_CHANNEL, INDEX)
    centred = tl.load(x + offsets, mask=there, other=0.0).to(tl.float32) - average
    y = activate(centred * factor + of_channels(bias, c, channels, 0.0, BIAS), ACTIVATION)
    size, zero = tl.load(scale), tl.load(zero_point)
    if kept_mean is not None:
        known = (c < channels) & (step == 0)
        tl.store(kept_mean + c, tl.sum(average, 0), mask=known)
        tl.store(kept_var + c, tl.sum(variance, 0), mask=known)
    tl.store(used, size, mask=tl.program_id(0) == 0)
    tl.store(used + 1, zero, mask=tl.program_id(0) == 0)
    _, q = round_to(y * reciprocal(size) + zero, quant_min, quant_max, WIDE)
    tl.store(out + offsets, narrow((q - zero) * size, out.dtype.element_ty), mask=there)


@triton.jit
def sums_kernel(
    grad_out, x, weight, bias, mean, var, scale, zero_point, grad_x, parts, outer, channels, inner, steps, slices, eps,
    quant_min, quant_max, TRAINING: tl.constexpr, LEARNED: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr, WIDE: tl.constexpr,
    R: tl.constexpr, W: tl.constexpr, BY_CHANNEL: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    # math     inner = act'(y) grad behind the clamp; sums of inner, of inner and centred x, and of LSQ's two terms;
    #          where statistics are frozen grad_x = inner * factor
    # traffic  grad_out and x read; frozen: grad_x written
    # grid     units x slices; a program walks over its slice's tiles
    # order    lanes in fp32, tiles in order; lanes folded in fp32, slices in double by the next kernel
    unit, slice = tl.program_id(0) // slices, tl.program_id(0) % slices
    c = channels_of(unit, W, BY_CHANNEL)
    average = of_channels(mean, c, channels, 0.0, True)
    inv_std = inverse_deviation(of_channels(var, c, channels, 1.0, True), eps)
    factor = of_channels(weight, c, channels, 1.0, WEIGHT) * inv_std
    shift = of_channels(bias, c, channels, 0.0, BIAS)
    inv, zero = reciprocal(tl.load(scale)), tl.load(zero_point)
    total, product = tl.zeros((R, W), tl.float32), tl.zeros((R, W), tl.float32)
    of_scale, outside = tl.zeros((R, W), tl.float32), tl.zeros((R, W), tl.float32)
    for step in range(first_step(slice, steps, slices), first_step(slice + 1, steps, slices)):
        offsets, there = tile(unit, step, outer, channels, inner, R, W, BY_CHANNEL, INDEX)
        centred = tl.load(x + offsets, mask=there, other=0.0).to(tl.float32) - average
        y = activate(centred * factor + shift, ACTIVATION)
        grad = tl.load(grad_out + offsets, mask=there, other=0.0).to(tl.float32)
        inside, error, clipped = learned_gradient(y, grad, inv, zero, quant_min, quant_max, WIDE)
        passed = tl.where(there, behind_activation(inside, y, ACTIVATION), 0.0)
        total += passed
        product += tl.where(there, passed * centred, 0.0)
        if LEARNED:
            of_scale += tl.where(there, error, 0.0)
            outside += tl.where(there, clipped, 0.0)
        if not TRAINING:
            tl.store(grad_x + offsets, narrow(passed * factor, grad_x.dtype.element_ty), mask=there)
    keep_part(parts, 0, slice, slices, c, channels, fold(total, BY_CHANNEL))
    keep_part(parts, 1, slice, slices, c, channels, fold(product, BY_CHANNEL))
    if LEARNED:
        keep_part(parts, 2, slice, slices, c, channels, fold(of_scale, BY_CHANNEL))
        keep_part(parts, 3, slice, slices, c, channels, fold(outside, BY_CHANNEL))


@triton.jit
def sums_finish_kernel(
    parts, var, grad_weight, grad_bias, of_range, eps, channels, slices,
    LEARNED: tl.constexpr, S: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # math     grad_bias and grad_weight; per channel the two terms of a learned range
    # traffic  parts read
    # grid     one program per BLOCK channels
    # order    slices in double, in a fixed order
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = c < channels
    inv_std = inverse_deviation(tl.load(var + c, mask=there, other=1.0), eps)
    tl.store(grad_bias + c, total_of(parts, 0, slices, c, channels, S), mask=there)
    tl.store(grad_weight + c, total_of(parts, 1, slices, c, channels, S) * inv_std, mask=there)
    if LEARNED:
        tl.store(of_range + c, total_of(parts, 2, slices, c, channels, S), mask=there)
        tl.store(of_range + channels + c, total_of(parts, 3, slices, c, channels, S), mask=there)


@triton.jit
def training_kernel(
    grad_out, x, weight, bias, mean, var, scale, zero_point, grad_weight, grad_bias, grad_x, outer, channels, inner,
    steps, eps, quant_min, quant_max, count,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr, ACTIVATION: tl.constexpr, WIDE: tl.constexpr,
    R: tl.constexpr, W: tl.constexpr, BY_CHANNEL: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    # math     grad_x = (inner - mean(inner) - normalized mean(inner normalized)) * factor
    # traffic  grad_out and x read, grad_x written
    # grid     units x steps: one tile a program
    # order    every operation rounded on its own
    unit, step = tl.program_id(0) // steps, tl.program_id(0) % steps
    c = channels_of(unit, W, BY_CHANNEL)
    inv_std = inverse_deviation(of_channels(var, c, channels, 1.0, True), eps)
    factor = of_channels(weight, c, channels, 1.0, WEIGHT) * inv_std
    offsets, there = tile(unit, step, outer, channels, inner, R, W, BY_CHANNEL, INDEX)
    centred = tl.load(x + offsets, mask=there, other=0.0).to(tl.float32) - of_channels(mean, c, channels, 0.0, True)
    y = activate(centred * factor + of_channels(bias, c, channels, 0.0, BIAS), ACTIVATION)
    grad = tl.load(grad_out + offsets, mask=there, other=0.0).to(tl.float32)
    inv, zero = reciprocal(tl.load(scale)), tl.load(zero_point)
    inside, _, _ = learned_gradient(y, grad, inv, zero, quant_min, quant_max, WIDE)
    passed = behind_activation(inside, y, ACTIVATION)
    mean_grad = quotient(of_channels(grad_bias, c, channels, 0.0, True), count)
    slope = quotient(of_channels(grad_weight, c, channels, 0.0, True), count) * inv_std
    result = (passed - mean_grad - centred * slope) * factor
    tl.store(grad_x + offsets, narrow(result, grad_x.dtype.element_ty), mask=there)


@register(schema.FORWARD, "triton")
def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    running_min: Tensor,
    running_max: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    training: bool,
    momentum: float,
    eps: float,
    activation: str | None,
    observe: bool,
    averaging_constant: float,
    quant_min: int,
    quant_max: int,
    symmetric: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`(out, mean, var, used)`, copies of the statistics that normalised and of the scale and zero point that rounded;
    stored statistics and range are updated in place."""
    x, weight, bias = dense(x), optional(weight), optional(bias)
    out, mean, var, used = schema.allocate(x)
    stored = Updated((running_mean, running_var), training)
    moving = Updated((running_min, running_max, scale, zero_point), observe)
    statistics, kept = ((mean, var), (None, None)) if training else (stored.values, (mean, var))
    layer = {"WEIGHT": weight is not None, "BIAS": bias is not None, "ACTIVATION": ACTIVATIONS[activation]}
    if training or observe:
        tiles = Tiles.of(view(x, 1), elements("reduction"))
        parts = torch.empty(5, tiles.slices, tiles.channels, dtype=torch.float32, device=x.device)
        extremes = torch.empty(2, tiles.channels, dtype=torch.float32, device=x.device)
        looks = {"TRAINING": training, "OBSERVE": observe}
        programs = tiles.units * tiles.slices
        launch(look_kernel, "reduction", programs, x, x, parts, *tiles, tiles.slices, **looks, **tiles.shape)
        count = x.numel() // tiles.channels
        finish(
            look_finish_kernel, tiles, parts, x, weight, bias, *stored.values, mean, var, extremes, tiles.inner,
            momentum, count / max(count - 1, 1), eps, **looks, **layer,
        )  # fmt: skip
        if observe:
            move_range(extremes, moving.values, averaging_constant, quant_min, quant_max, symmetric)
    tiles = Tiles.of(view(x, 1), elements("elementwise"))
    launch(
        quantize_kernel, "elementwise", tiles.units * tiles.steps, x, x, weight, bias, *statistics, *moving.values[2:],
        out, *kept, used, *tiles, eps, float(quant_min), float(quant_max), WIDE=wide(quant_min, quant_max), **layer,
        **tiles.shape,
    )  # fmt: skip
    stored.done()
    moving.done()
    return out, mean, var, used


@register(schema.BACKWARD, "triton")
def backward(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    training: bool,
    eps: float,
    activation: str | None,
    quant_min: int,
    quant_max: int,
    learned: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias, scale and zero_point, the last two of no dimensions; without elements if not
    learned."""
    x, weight, bias, mean, var = dense(x), optional(weight), optional(bias), fp32(mean), fp32(var)
    scale, zero_point, grad_out = fp32(scale), fp32(zero_point), in_order_of(x, grad_out)
    grad_x, grad_weight, grad_bias, grad_scale, grad_zero_point = schema.allocate_grads(grad_out, x, learned)
    layer = {"WEIGHT": weight is not None, "BIAS": bias is not None, "ACTIVATION": ACTIVATIONS[activation]}
    layer["WIDE"] = wide(quant_min, quant_max)
    tensors, bounds = (weight, bias, mean, var, scale, zero_point), (eps, float(quant_min), float(quant_max))
    tiles = Tiles.of(view(x, 1), elements("reduction"))
    parts = torch.empty(4, tiles.slices, tiles.channels, dtype=torch.float32, device=x.device)
    of_range = torch.empty(2, tiles.channels, dtype=torch.float32, device=x.device)
    launch(
        sums_kernel, "reduction", tiles.units * tiles.slices, x, grad_out, x, *tensors, grad_x, parts, *tiles,
        tiles.slices, *bounds, TRAINING=training, LEARNED=learned, **layer, **tiles.shape,
    )  # fmt: skip
    finish(sums_finish_kernel, tiles, parts, var, grad_weight, grad_bias, of_range, eps, LEARNED=learned)
    if training:
        tiles = Tiles.of(view(x, 1), elements("elementwise"))
        launch(
            training_kernel, "elementwise", tiles.units * tiles.steps, x, grad_out, x, *tensors, grad_weight,
            grad_bias, grad_x, *tiles, *bounds, float(x.numel() // tiles.channels), **layer, **tiles.shape,
        )  # fmt: skip
    if learned:
        grad_scale, outside = of_range.sum(1).unbind()
        grad_scale, grad_zero_point = grad_scale.clone(), -outside * scale.reshape(())
    return grad_x, grad_weight, grad_bias, grad_scale, grad_zero_point
