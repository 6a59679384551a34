"""Weights rounded so that they take back what rounding the others has added, and scales that suit the integers.

    H = x x^T + damping mean(diag(x x^T)) I,  x the centred inputs of the layer, that the rounded layers before it make
    error = (w - scale q)^T H (w - scale q), of each output channel; from several first scales, the best counts:
        U = upper Cholesky factor of H^-1
        for each input k, those with most variance first:
            q_k = round(w_k / scale)
            w_j -= (w_k - scale q_k) U_kj / U_kk   for all j that are not rounded yet
        several times, for each input k:
            q_k = round(q_k + (H (w - scale q))_k / (scale H_kk)),   w as it was
        scale = q^T H w / q^T H q

First come least squares for the weights that are left, one rounding at a time, then the best of each integer beside all
others. The mean of a channel moves: a bias takes that back, or the batch norms, which are corrected afterwards. Here
the inputs are those of noise. Sources: E. Frantar et al., GPTQ, ICLR 2023, algorithm 1; B. Hassibi and D. Stork,
Optimal Brain Surgeon, NeurIPS 1992; K. Behdin et al., QuantEase, arXiv 2309.01885 (coordinate descent).
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor, fx

from dfq.quant.modes import batch_statistics
from dfq.quant.quantizers import WeightQuantizer, weight_layers

DAMPING = 0.1
PLACES = 512  # of an image: outputs whose inputs are looked at
BLOCK = 128  # inputs whose corrections reach the rest in one product
STARTS = 0.85, 1.0, 1.15  # first scales, in units of that of least squared error
SWEEPS = 2  # of the descent, over all inputs
LARGEST = 5000  # inputs of an output: factors of larger matrices take minutes and gigabytes
INSIDE = 0.45  # of a scale, from an integer: what is rounded to it for certain
TINY = 1e-12


@torch.no_grad()
def compensate(student: fx.GraphModule, images: Tensor, seed: int) -> None:
    """Moves the symmetric weights of fewer than 8 bits so that they are rounded to the compensated ones.

    A warning names the layers whose weights stay as they are: those that do not say what their weights multiply
    (transposed convolutions), whose weight another one has, with more than `LARGEST` inputs of an output, or whose
    input is not finite.

    Args:
        student: of `dfq.quant.prepare`, with ranges set and scales of weights fixed (`fit_weights`).
        images: `[N, ...]`; batch norms normalise them by their own statistics.
        seed: of the places that are drawn.
    """
    few = {
        name: quantizer
        for name, quantizer, _ in weight_layers(student)
        if quantizer.bits < 8 and quantizer.scheme == "symmetric"
    }
    owners = [id(student.get_submodule(name).weight) for name, _, _ in weight_layers(student)]
    random = torch.Generator().manual_seed(seed)
    left: list[str] = []

    def before(name: str, layer: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x, x_scale, _, scale = inputs
        samples = layer.patches(x.float(), PLACES, random)
        why = _why_not(samples, alone=owners.count(id(layer.weight)) == 1)
        if samples is None or why is not None:
            left.append(f"{name} ({why})")
            return inputs
        rounded, fitted = _compensate(layer, few[name], samples, scale)
        return x, x_scale, rounded, fitted

    layers = {name: student.get_submodule(name) for name in few}
    hooks = [
        layer.register_forward_pre_hook(lambda layer, inputs, name=name: before(name, layer, inputs))
        for name, layer in layers.items()
    ]
    try:
        with batch_statistics(student, ranges=False):
            student(images)
    finally:
        for hook in hooks:
            hook.remove()
    if left:
        warnings.warn(f"analytic: weights are rounded without compensation in {', '.join(left)}", stacklevel=3)


def _why_not(samples: Tensor | None, *, alone: bool) -> str | None:
    """Why a layer's rounding is not compensated; None: it is."""
    if not alone:
        return "another layer has its weight"
    if samples is None:
        return "what its weights multiply is not known"
    if samples.shape[1] > LARGEST:
        return f"over {LARGEST:,} inputs"
    return None if bool(samples.isfinite().all()) else "its input is not finite"


def _compensate(layer: Any, quantizer: WeightQuantizer, samples: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """One layer's weights, scales and, without a batch norm, biases; gives its rounded weights and scales."""
    as_it_was = layer.oriented().clone()
    rounded, fitted = compensated(as_it_was, covariance(samples), scale, quantizer.quant_min, quantizer.quant_max)
    quantizer.scale.copy_(fitted)
    layer.weight.copy_(nearest_that_rounds(as_it_was, rounded, fitted, quantizer.quant_min, quantizer.quant_max))
    rounded, fitted = quantizer(layer.oriented())
    if layer.bias is not None and layer.tail.bn is None:
        layer.bias.sub_(mean_shift(rounded - as_it_was, samples))
    return rounded, fitted


def nearest_that_rounds(weight: Tensor, rounded: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    """What is rounded to `rounded` and next to `weight`: training changes integers sooner than from their middles."""
    step = scale.view(-1, *[1] * (weight.dim() - 1))
    least, most = rounded - INSIDE * step, rounded + INSIDE * step
    least = torch.where(rounded <= (low + 0.5) * step, -math.inf, least)
    most = torch.where(rounded >= (high - 0.5) * step, math.inf, most)
    return torch.minimum(torch.maximum(weight, least), most)


def mean_shift(change: Tensor, samples: Tensor) -> Tensor:
    """What a change of the weights, output channels first, adds to the mean of every output channel."""
    mean = samples.mean(2)
    return (change.reshape(len(mean), -1, mean.shape[1]) @ mean[:, :, None]).flatten()


def covariance(samples: Tensor) -> Tensor:
    """Of inputs `[groups, K, samples]`: `[groups, K, K]`, damped, float64."""
    centred = samples - samples.mean(2, keepdim=True)
    found = (centred @ centred.transpose(1, 2)).double() / samples.shape[2]
    level = DAMPING * found.diagonal(dim1=1, dim2=2).mean(1) + TINY
    return found + level[:, None, None] * torch.eye(found.shape[1], dtype=found.dtype, device=found.device)


def compensated(weight: Tensor, covariance: Tensor, scale: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """Compensated weights, integers times their scale, and this scale.

    Args:
        weight: output channels first.
        covariance: `[groups, K, K]` of what they multiply, positive definite.
        scale: of every output channel, where the search starts.
        low, high: the integers there are.
    """
    groups, inputs, _ = covariance.shape
    wanted, first = weight.double().reshape(groups, -1, inputs), scale.double().reshape(groups, -1)
    order, factor = elimination(covariance)
    found, steps, errors = [], [], []
    for start in STARTS:
        integers = rounded_in_order(wanted, order, factor, first * start, low, high)
        integers = descended(integers, wanted, covariance, first * start, low, high)
        step = fitted_scale(integers, wanted, covariance, first * start)
        off = wanted - integers * step[..., None]
        found.append(integers)
        steps.append(step)
        errors.append((off @ covariance * off).sum(2))
    best = torch.stack(errors).argmin(0, keepdim=True)
    step = torch.stack(steps).gather(0, best)[0]
    integers = torch.stack(found).gather(0, best[..., None].expand(-1, -1, -1, inputs))[0]
    rounded = (integers * step[..., None]).reshape(weight.shape).to(weight.dtype)
    return rounded, step.reshape(scale.shape).to(scale.dtype)


def elimination(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs in the order in which they are rounded, `[groups, K]`, and `U` of the covariance in this order."""
    order = covariance.diagonal(dim1=1, dim2=2).argsort(1, descending=True)
    sorted_rows = covariance.gather(1, order[:, :, None].expand_as(covariance))
    ordered = sorted_rows.gather(2, order[:, None].expand_as(covariance))
    return order, torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(ordered)), upper=True)


def rounded_in_order(wanted: Tensor, order: Tensor, factor: Tensor, step: Tensor, low: int, high: int) -> Tensor:
    """Integers `[groups, channels, K]`, one input after the other; order, factor: of `elimination`."""
    inputs = wanted.shape[2]
    left = wanted.gather(2, order[:, None].expand_as(wanted))
    integers = torch.empty_like(left)
    for first in range(0, inputs, BLOCK):
        last = min(first + BLOCK, inputs)
        errors = torch.zeros_like(left[:, :, first:last])
        for k in range(first, last):
            now = left[:, :, k]
            integers[:, :, k] = (now / step).round().clamp(low, high)
            errors[:, :, k - first] = (now - integers[:, :, k] * step) / factor[:, k, k, None]
            left[:, :, k + 1 : last] -= errors[:, :, k - first, None] * factor[:, None, k, k + 1 : last]
        left[:, :, last:] -= errors @ factor[:, first:last, last:]
    return integers.gather(2, order.argsort(1)[:, None].expand_as(left))


def descended(integers: Tensor, wanted: Tensor, covariance: Tensor, step: Tensor, low: int, high: int) -> Tensor:
    """Each integer in turn becomes the best beside all others; the error only falls."""
    found, inputs = integers.clone(), wanted.shape[2]
    curvature = covariance.diagonal(dim1=1, dim2=2)[:, None] * step[..., None]
    slope = (wanted - integers * step[..., None]) @ covariance
    for first in [*range(0, inputs, BLOCK)] * SWEEPS:
        last = min(first + BLOCK, inputs)
        near, moved = slope[:, :, first:last], torch.zeros_like(slope[:, :, first:last])
        for k in range(first, last):
            better = (found[:, :, k] + slope[:, :, k] / curvature[:, :, k]).round().clamp(low, high)
            moved[:, :, k - first] = (better - found[:, :, k]) * step
            found[:, :, k] = better
            near -= moved[:, :, k - first, None] * covariance[:, None, k, first:last]
        beyond = moved @ covariance[:, first:last]
        slope[:, :, :first] -= beyond[:, :, :first]
        slope[:, :, last:] -= beyond[:, :, last:]
    return found


def fitted_scale(integers: Tensor, wanted: Tensor, covariance: Tensor, step: Tensor) -> Tensor:
    """The scale `[groups, channels]` with which these integers have the least error; that of before where all are 0."""
    seen = integers @ covariance
    power, shared = (seen * integers).sum(2), (seen * wanted).sum(2)
    return torch.where((power > 0) & (shared > 0), shared / power.clamp(min=TINY), step)
