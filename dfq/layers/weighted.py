"""What convolutions and linear layers share: a weight with bits of its own, and accumulators of integers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from dfq.layers.integers import Integers
from dfq.layers.kind import Kind, Layer, Read, integers_of, per_channel
from dfq.layers.tail import Activated, Tail
from dfq.network.calls import Call

EXACT_LIMIT = 2.0**24  # sums of integers up to here are exact in fp32, in any order


class Weighted(Kind):
    """A kind whose second argument is a weight."""

    weighted = True

    def why_float(self, call: Call) -> str | None:
        given = call.arguments()
        if call.constant(given["weight"]) is None:
            return "its weight depends on the images"
        if given.get("bias") is not None and call.constant(given["bias"]) is None:
            return "its bias depends on the images"
        return None

    def reads(self, call: Call, bits: int) -> list[Read]:
        return [bits]

    def weight(self, call: Call) -> nn.Parameter:
        """The parameter, as the model has it."""
        return _parameter(call, "weight")

    def bias(self, call: Call) -> nn.Parameter | None:
        return None if call.arguments().get("bias") is None else _parameter(call, "bias")

    def oriented(self, call: Call, weight: Any) -> Any:
        """The weight with its output channels first, of a tensor or a node of a graph."""
        return weight

    def joins_batch_norm(self, call: Call) -> bool:
        """Whether a batch norm after the call counts the call's own output channels."""
        return True


def _parameter(call: Call, name: str) -> nn.Parameter:
    value = call.constant(call.arguments()[name])
    assert value is not None
    return value if isinstance(value, nn.Parameter) else nn.Parameter(value.detach().clone())


class QuantLayer(Layer):
    """Weight, bias, and what follows; the weight arrives fake-quantized, output channels first."""

    channel_axis = 1

    def oriented(self) -> Tensor:
        """The weight with its output channels first."""
        return self.weight

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, tail: Tail) -> None:
        super().__init__(tail)
        self.weight, self.bias = weight, bias

    def accumulate(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The linear map of the layer."""
        raise TypeError(f"{type(self).__name__} must define accumulate")

    def patches(self, x: Tensor, places: int, random: torch.Generator) -> Tensor | None:
        """What the weights multiply, `[groups, K, samples]`: that of each output channel, flat, lies along `K`.

        Args:
            x: the layer's input.
            places: of each image that are drawn; all, if it has no more.
            random: who draws.

        Returns:
            None: the layer does not say it.
        """
        return None

    def forward(self, *pairs: Tensor | None) -> Activated:
        x, x_scale, weight, weight_scale = pairs
        assert x is not None and weight is not None and weight_scale is not None
        if self.training:
            return self.tail(self.fake_quantized(x, x_scale, weight, weight_scale))
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            return self.tail.finish(self.exact_sums(x.float(), x_scale, weight, weight_scale))

    def fake_quantized(self, x: Tensor, x_scale: Tensor | None, weight: Tensor, weight_scale: Tensor) -> Tensor:
        """The layer on fake-quantized values, differentiable."""
        return self.accumulate(x, weight, self.bias)

    def exact_sums(self, x: Tensor, x_scale: Tensor | None, weight: Tensor, weight_scale: Tensor) -> Tensor:
        """`float(acc) * mult + bias`, with the batch norm in both constants, the bias on the accumulators' grid."""
        axis = self.channel_axis % x.dim()
        mult, bias = self.tail.constants(self.bias, weight_scale)
        integer_weight = torch.round(weight / per_channel(weight_scale, weight, 0))
        if x_scale is None:  # an input that is not quantized: nothing to be exact about
            acc = self.accumulate(x, integer_weight, None)
        else:
            acc = self.accumulate_integers(integers_of(x, x_scale), integer_weight)
            mult = x_scale * mult
            bias = on_accumulators(bias, mult)
        return acc * per_channel(mult, acc, axis) + per_channel(bias, acc, axis)

    def accumulate_integers(self, x: Tensor, weight: Tensor) -> Tensor:
        """The exact accumulators as fp32.

        In fp32 on a CPU where no partial sum can pass 2^24; else of the weight's halves of 4 bits one after the other,
        where theirs cannot; else, and always on a GPU, in float64. (cuDNN may pick a Winograd or a TF32 algorithm for
        fp32; its float64 results are off by far less than a half.)
        """
        largest = float(x.detach().abs().max()) if x.numel() else 0.0
        if x.device.type == "cpu":
            high = torch.round(weight / 16)
            for parts in ((weight,), (weight - 16 * high, high)):
                rows = max(float(part.detach().flatten(1).abs().sum(1).max()) for part in parts)
                if largest * rows >= EXACT_LIMIT:
                    continue
                with torch.backends.nnpack.flags(enabled=False):  # its Winograd convolutions are not exact
                    low, *rest = (self.accumulate(x, part, None) for part in parts)
                return low if not rest else (rest[0].double() * 16 + low.double()).float()
        return torch.round(self.accumulate(x.double(), weight.double(), None)).float()

    def constants_for(self, to: Integers, x: str, wide: tuple[int, ...]) -> dict[str, Any]:
        """The fields of the integer step that every layer has; wide: the shape of its integer weight."""
        integers, scale, bits = to.weight()
        mult, bias = self.tail.constants(self.bias, scale)
        mult = torch.tensor(to.grid(x).scale) * mult
        return {
            "x": x, "outs": (), "activation": None, "name": to.name, "weight": integers.reshape(wide),
            "weight_bits": bits, "mult": mult, "bias": on_accumulators(bias, mult), "residual": None,
        }  # fmt: skip


def on_accumulators(bias: Tensor, mult: Tensor) -> Tensor:
    """`rne(bias / mult) * mult`: an integer that is added to the accumulators, as other runtimes do in int32.

    A bias of 2^24 steps or more stays as it is: fp32 holds it no finer.
    """
    steps = bias / mult
    return torch.where(steps.abs() < EXACT_LIMIT, torch.round(steps) * mult, bias)


def lies_on_accumulators(bias: Tensor, mult: Tensor) -> bool:
    """Whether `on_accumulators` made it; 2^22 steps and more are not told apart, so fine is the grid there."""
    steps = bias / mult
    return bool(((torch.round(steps) * mult == bias) | ~(steps.abs() < EXACT_LIMIT / 4)).all())


def node_or_tensor(value: Any, method: str, *arguments: Any) -> Any:
    """A method of a tensor, or the call of it in the graph that a node is in."""
    if isinstance(value, fx.Node):
        return value.graph.call_method(method, (value, *arguments))
    return getattr(value, method)(*arguments)
