"""Batch norms of stored statistics. After a layer they are in its constants; on their own they are a step:
`t = (x - mean[c]) * mult[c] + bias[c]`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import dfq_kernels
from dfq.engine import graph
from dfq.layers.integers import Integers
from dfq.layers.kind import Kind, Layer, register
from dfq.layers.tail import FUSED, Activated, StoredNorm, Tail, activate
from dfq.network.calls import Call
from dfq_kernels.bn_act_stats.reference import multiplier


@register
class BatchNorm(Kind):
    """`t = (x - mean[c]) * (weight[c] / sqrt(var[c] + eps)) + bias[c]`, of stored statistics."""

    name = "batch norm"
    calls = ("aten.batch_norm.default",)
    normalizes = True

    def why_float(self, call: Call) -> str | None:
        given = call.arguments()
        if given["training"]:
            return "it measures its own images"
        named = ("weight", "bias", "running_mean", "running_var")
        moving = [key for key in named if given[key] is not None and call.constant(given[key]) is None]
        return f"its {moving[0]} depends on the images" if moving else None

    def layer(self, call: Call, tail: Tail) -> Layer:
        return QuantBatchNorm(tail)


def stored_norm(call: Call, module: nn.Module | None) -> StoredNorm:
    """What a batch norm holds; module: the user's that made the call, which says how its statistics move."""
    given = call.arguments()
    weight, bias, mean, var = (
        None if given[key] is None else call.constant(given[key])
        for key in ("weight", "bias", "running_mean", "running_var")
    )
    assert mean is not None and var is not None
    momentum = getattr(module, "momentum", given["momentum"])
    batches = getattr(module, "num_batches_tracked", None)
    momentum = given["momentum"] if momentum is None and batches is None else momentum
    return StoredNorm(weight, bias, mean, var, float(given["eps"]), momentum, batches)


class QuantBatchNorm(Layer):
    """A batch norm on its own; in evaluation the same arithmetic with stored statistics."""

    def compute(self, *pairs: Tensor | None) -> Tensor:
        assert pairs[0] is not None
        return pairs[0]  # its tail has the batch norm

    def forward(self, *pairs: Tensor | None) -> Activated:
        if self.training:
            return super().forward(*pairs)
        x, tail = pairs[0], self.tail
        assert x is not None and tail.bn is not None
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            fused = tail.activation in FUSED
            if tail.quantizer is not None and fused:
                return tail(x.float())
            out, _, _ = dfq_kernels.bn_act_stats(
                x.float(), tail.bn.weight, tail.bn.bias, tail.bn.running_mean, tail.bn.running_var, eps=tail.bn.eps,
                activation=tail.activation if fused else None,
            )  # fmt: skip
            if fused:
                return out
            out = activate(out, tail.activation)
            if tail.quantizer is None:
                return out
            quantized: Activated = tail.quantizer(out)
            return quantized

    def export(self, to: Integers) -> None:
        norm = self.tail.bn
        assert norm is not None
        mult = multiplier(norm.weight, norm.running_var, norm.eps)
        bias = torch.zeros_like(mult) if norm.bias is None else norm.bias
        to.step(graph.Rescale(to.value(0), (), None, norm.running_mean.clone(), mult.clone(), bias.clone()))
