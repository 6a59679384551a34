"""Weights that are rounded one after the other, each taking back what the ones before it have added.

    H = x x^T + damping mean(diag(x x^T)) I,  x the centred inputs of the layer, that the rounded layers before it make
    U = upper Cholesky factor of H^-1
    for each input k, those with most variance first:
        q_k = round(w_k / scale) scale
        w_j -= (w_k - q_k) U_kj / U_kk   for all j that are not rounded yet

It is the solution of least squares for the weights that are left, one rounding at a time. The mean of a channel moves:
a bias takes that back, or the batch norms, which are corrected afterwards. Here the inputs are those of noise. Sources:
E. Frantar et al., GPTQ, ICLR 2023, algorithm 1; B. Hassibi and D. Stork, Optimal Brain Surgeon, NeurIPS 1992.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from dfq.layers.weighted import QuantLayer
from dfq.quant.modes import batch_statistics
from dfq.quant.quantizers import WeightQuantizer, weight_layers

DAMPING = 0.1
PLACES = 512  # of an image: outputs whose inputs are looked at
BLOCK = 128  # inputs whose corrections reach the rest in one product
LARGEST = 5000  # inputs of an output: factors of larger matrices take minutes and gigabytes
TINY = 1e-12


@torch.no_grad()
def compensate(student: fx.GraphModule, images: Tensor, seed: int) -> None:
    """Moves the weights of fewer than 8 bits so that they are rounded to the compensated ones.

    Args:
        student: of `dfq.quant.prepare`, with ranges set and scales of weights fixed (`fit_weights`). Layers stay as
            they are that do not say what their weights multiply, whose weight another one has, or with more than
            `LARGEST` inputs of an output.
        images: `[N, ...]`; batch norms normalise them by their own statistics.
        seed: of the places that are drawn.
    """
    quantizers = {name: quantizer for name, quantizer, _ in weight_layers(student)}
    layers = {name: student.get_submodule(name) for name in quantizers}
    random = torch.Generator().manual_seed(seed)
    owners = [id(layer.weight) for layer in layers.values()]

    def before(layer: Any, inputs: tuple[Tensor, ...], quantizer: WeightQuantizer) -> tuple[Tensor, ...]:
        x, x_scale, _, scale = inputs
        samples = layer.patches(x.float(), PLACES, random)
        if samples is None or samples.shape[1] > LARGEST or not bool(samples.isfinite().all()):
            return inputs
        as_it_was = layer.oriented().clone()
        moved = compensated(as_it_was, covariance(samples), scale, quantizer.quant_min, quantizer.quant_max)
        layer.weight.copy_(moved)
        rounded = quantizer(moved)[0]
        if layer.bias is not None and layer.tail.bn is None:
            layer.bias.sub_(mean_shift(rounded - as_it_was, samples))
        return x, x_scale, rounded, scale

    hooks = []
    for name, layer in layers.items():
        quantizer = quantizers[name]
        alone = isinstance(layer, QuantLayer) and owners.count(id(layer.weight)) == 1
        if alone and quantizer.bits < 8 and quantizer.scheme == "symmetric":
            hooks.append(
                layer.register_forward_pre_hook(lambda layer, inputs, q=quantizer: before(layer, inputs, q))  # type: ignore[misc]
            )
    try:
        with batch_statistics(student, ranges=False):
            student(images)
    finally:
        for hook in hooks:
            hook.remove()


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


def compensated(weight: Tensor, covariance: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    """Weights that `round(weight / scale)` rounds to the compensated integers.

    Args:
        weight: output channels first.
        covariance: `[groups, K, K]` of what they multiply, positive definite.
        scale: of every output channel.
        low, high: the integers there are.
    """
    groups, inputs, _ = covariance.shape
    left, step = weight.double().reshape(groups, -1, inputs), scale.double().reshape(groups, -1)
    order = covariance.diagonal(dim1=1, dim2=2).argsort(1, descending=True)
    left = left.gather(2, order[:, None].expand_as(left))
    sorted_rows = covariance.gather(1, order[:, :, None].expand_as(covariance))
    ordered = sorted_rows.gather(2, order[:, None].expand_as(covariance))
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(ordered)), upper=True)
    for first in range(0, inputs, BLOCK):
        last = min(first + BLOCK, inputs)
        errors = torch.zeros_like(left[:, :, first:last])
        for k in range(first, last):
            now = left[:, :, k]
            rounded = (now / step).round().clamp(low, high) * step
            errors[:, :, k - first] = (now - rounded) / factor[:, k, k, None]
            left[:, :, k + 1 : last] -= errors[:, :, k - first, None] * factor[:, None, k, k + 1 : last]
        left[:, :, last:] -= errors @ factor[:, first:last, last:]
    return left.gather(2, order.argsort(1)[:, None].expand_as(left)).reshape(weight.shape).to(weight.dtype)
