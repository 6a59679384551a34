"""How large each layer's accumulators can get: what its exact forward computes in, and whether int32 suffices."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from dfq.layers.kind import per_channel
from dfq.layers.weighted import EXACT_LIMIT, QuantLayer
from dfq.quant.quantizers import ActivationQuantizer, WeightQuantizer, weight_layers


@dataclass(frozen=True)
class LayerBound:
    """One convolution or linear layer of a quantized graph.

    layer: its name; weight_bits, activation_bits: of its weights and its input (None: the input is not quantized);
    bound: largest over output channels of `max |q_x - zero_point| * sum |q_w|`, which no partial sum can pass;
    exact_in_fp32: the bound is below 2^24, so fp32 sums are exact in any order; float64 else.
    """

    layer: str
    weight_bits: int
    activation_bits: int | None
    bound: float | None
    exact_in_fp32: bool


@torch.no_grad()
def layer_bounds(model: fx.GraphModule) -> list[LayerBound]:
    """The bound of every layer of a graph that `prepare` made, in the order of the graph."""
    quantizers = input_quantizers(model)
    return [_bound(name, layer, weight, quantizers[name]) for name, layer, weight in weight_layers(model)]


def input_quantizers(model: fx.GraphModule) -> dict[str, ActivationQuantizer | None]:
    """By the name of a layer with weights what quantizes its input."""
    return {
        str(node.target): quantizer_of(node.args[1], model)
        for node in model.graph.nodes
        if node.op == "call_module" and isinstance(model.get_submodule(str(node.target)), QuantLayer)
    }


def quantizer_of(scale: fx.Node | None, model: fx.GraphModule) -> ActivationQuantizer | None:
    """The quantizer whose second result `scale` is."""
    if scale is None:
        return None
    module = model.get_submodule(str(scale.all_input_nodes[0].target))
    (quantizer,) = [item for item in module.modules() if isinstance(item, ActivationQuantizer)]
    return quantizer


def _bound(name: str, layer: WeightQuantizer, weight: Tensor, quantizer: ActivationQuantizer | None) -> LayerBound:
    if quantizer is None:
        return LayerBound(name, layer.bits, None, None, False)
    out, scale = layer(weight)
    integers = torch.round(out / per_channel(scale, out, 0))
    zero_point = float(quantizer.zero_point)
    largest = max(quantizer.quant_max - zero_point, zero_point - quantizer.quant_min)
    bound = largest * float(integers.flatten(1).abs().sum(1, dtype=torch.float64).max())
    return LayerBound(name, layer.bits, quantizer.bits, bound, bound < EXACT_LIMIT)
