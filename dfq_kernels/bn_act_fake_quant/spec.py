"""Cases of `bn_act_fake_quant`: training and frozen, observing and learned, activations, types, layouts."""

from __future__ import annotations

from typing import Any

import torch

from dfq_kernels.bn_act_fake_quant.api import bn_act_fake_quant
from dfq_kernels.specs import Case, OpSpec, batch_norm, fresh_range, layout_cases, mask_bytes, nbytes, randn

Arguments = tuple[dict[str, Any], dict[str, Any]]


def _random(dtype: torch.dtype = torch.float32, affine: bool = True, spread: float = 1, **settings: Any) -> Any:
    def make(generator: torch.Generator) -> Arguments:
        x = randn(generator, 4, 16, 9, 7, scale=spread).to(dtype)
        parameters = batch_norm(generator, 16)
        if not affine:
            parameters |= {"weight": None, "bias": None}
        ranges = fresh_range(0.0, 2.0, scale=0.15) if not settings.get("observe", True) else fresh_range()
        return {"x": x, **parameters, **ranges}, {"quant_max": 15, **settings}

    return make


def _nan_among_numbers(generator: torch.Generator) -> Arguments:
    """It stays NaN behind the activation and the clamp, and leaves the range where it is."""
    tensors, keywords = _random(activation="relu6")(generator)
    tensors["x"][1, 2, 3, 4] = float("nan")
    return {**tensors, **fresh_range(-1.0, 1.0)}, keywords


def _layout(x: torch.Tensor) -> Arguments:
    parameters = batch_norm(torch.Generator().manual_seed(1), x.shape[1])
    return {"x": x, **parameters, **fresh_range()}, {"quant_max": 15}


def _below_0(generator: torch.Generator) -> Arguments:
    tensors, keywords = _random(observe=False)(generator)
    return {**tensors, "scale": torch.tensor(-0.1)}, keywords


def _wide(_: torch.Generator) -> Arguments:
    stored = {"running_mean": torch.zeros(1), "running_var": torch.ones(1), "weight": None, "bias": None}
    x = torch.tensor([-2e38, 0.0, 1.0, 2e38]).view(4, 1)
    return {"x": x, **stored, **fresh_range()}, {"activation": None}


def _bytes_moved(tensors: dict[str, Any], keywords: dict[str, Any]) -> tuple[int, int]:
    """A batch norm is monotone per channel, so one read of x gives its statistics and the range of its output.

    Frozen statistics and a given range need no such read. Backward: gradient and x are read once for the sums and, in
    training, once more for the gradient of x, which is written.
    """
    size = nbytes(tensors["x"])
    training, observe = keywords.get("training", False), keywords.get("observe", True)
    mask = 0 if training else mask_bytes(tensors["x"])
    return (3 if training or observe else 2) * size + mask, (5 if training else 3) * size


SPEC = OpSpec(
    op="bn_act_fake_quant",
    call=bn_act_fake_quant,
    differentiable=("x", "weight", "bias", "scale"),
    mutated=("running_mean", "running_var", "running_min", "running_max", "scale", "zero_point"),
    exact=False,
    rtol=1e-5,
    atol=1e-6,
    cases=(
        Case("frozen", _random()),
        Case("training", _random(training=True)),
        Case("training_learned", _random(training=True, observe=False)),
        Case("frozen_learned", _random(observe=False)),
        Case("relu6", _random(activation="relu6", spread=9)),
        Case("identity", _random(activation=None, quant_min=-8, quant_max=7)),
        Case("symmetric", _random(activation=None, quant_min=-8, quant_max=7, symmetric=True)),
        Case("no_parameters", _random(affine=False)),
        Case("bf16", _random(torch.bfloat16)),
        Case("fp16", _random(torch.float16)),
        Case("scale_below_0", _below_0, gradients=False),
        Case("wider_than_fp32", _wide, gradients=False),
        Case("nan_among_numbers", _nan_among_numbers, gradients=False),
        *layout_cases(_layout),
    ),
    bytes_moved=_bytes_moved,
    mutations=(
        ("var * (count / (count - 1))", "var"),
        ("grad = activation_grad(grad, y, activation)", "grad = grad"),
        ("- per_axis(grad_bias / count, x, 1)", ""),
        ("- normalized * per_axis(grad_weight / count, x, 1)", ""),
        ("grad_weight = (grad * normalized)", "grad_weight = (grad * x)"),
        ("if observe:", "if False:"),
        ("mean, var = bn_stats.forward(x)", "mean, var = running_mean.clone(), running_var.clone()"),
    ),
)
