"""What a layer ends with: batch norm, activation and quantizer, each optional."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dfq_kernels.activations import activation_of

Activated = Tensor | tuple[Tensor, Tensor]


class StoredNorm(nn.Module):
    """A batch norm's parameters and statistics, those of the model itself.

    momentum None: the average over all batches, counted in num_batches_tracked.
    """

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor | None

    def __init__(
        self, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float,
        momentum: float | None = 0.1, batches: Tensor | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        for name, value in (("weight", weight), ("bias", bias)):
            parameter = value if value is None or isinstance(value, nn.Parameter) else nn.Parameter(value.clone())
            self.register_parameter(name, parameter)
        self.register_buffer("running_mean", mean)
        self.register_buffer("running_var", var)
        self.register_buffer("num_batches_tracked", batches)
        self.eps, self.momentum = eps, momentum


def activate(x: Tensor, text: str | None) -> Tensor:
    """The activation of this text, each fp32 operation rounded on its own."""
    activation = activation_of(text)
    if activation.name is None:
        return x
    if activation.name == "relu":
        return F.relu(x)
    if activation.bounds is not None:
        return x.clamp(*activation.bounds)
    if activation.name == "leaky_relu":
        return torch.where(x > 0, x, x * activation.a)
    gate = (x + 3).clamp(0, 6) * SIXTH
    return gate if activation.name == "hardsigmoid" else x * gate


SIXTH = 0.1666666716337204  # 1/6 in fp32
FUSED = (None, "relu", "relu6")  # what the kernels for batch norm, activation and quantizer in one know


class Tail(nn.Module):
    """Batch norm, activation and quantizer of a layer.

    quantizer: gives `(value, scale)`; `after_batch_norm` is its call for all three at once (`dfq.quant.quantizers`).
    """

    def __init__(
        self,
        batch_norm: StoredNorm | None = None,
        activation: str | None = None,
        quantizer: Any = None,
        *,
        train_batch_norm: bool = False,
    ) -> None:
        super().__init__()
        self.bn, self.activation, self.quantizer = batch_norm, activation, quantizer
        self.train_batch_norm, self.adapting = train_batch_norm, False

    def forward(self, x: Tensor) -> Activated:
        if self.bn is None:
            return self.finish(x)
        training = self.training and self.adapting and self.train_batch_norm
        averaged = training and self.bn.momentum is None  # over all batches, as torch does then
        stored = self.bn.running_mean, self.bn.running_var
        mean, var = (value.clone() for value in stored) if averaged else stored
        momentum = 1.0 if averaged or self.bn.momentum is None else self.bn.momentum
        result = self._normalized(x, mean, var, momentum, training)
        if training and self.bn.num_batches_tracked is not None:
            self.bn.num_batches_tracked.add_(1)
        if averaged:
            weight = 1 / self.bn.num_batches_tracked.to(mean)  # type: ignore[union-attr]
            for value, batch in zip(stored, (mean, var), strict=True):
                value.lerp_(batch, weight)
        return result

    def _normalized(self, x: Tensor, mean: Tensor, var: Tensor, momentum: float, training: bool) -> Activated:
        """Batch norm, activation and quantizer; in training `mean` and `var` move by `momentum`."""
        assert self.bn is not None
        if self.quantizer is None or self.activation not in FUSED:
            out = F.batch_norm(x, mean, var, self.bn.weight, self.bn.bias, training, momentum, self.bn.eps)
            return self.finish(out)
        fused: Activated = self.quantizer.after_batch_norm(
            x, self.bn, mean, var, training=training, momentum=momentum, activation=self.activation
        )
        return fused

    def finish(self, x: Tensor) -> Activated:
        """Activation and quantizer only: the batch norm is in the constants already, or there is none."""
        out = activate(x, self.activation)
        if self.quantizer is None:
            return out
        quantized: Activated = self.quantizer(out)
        return quantized

    def constants(self, layer_bias: Tensor | None, weight_scale: Tensor) -> tuple[Tensor, Tensor]:
        """`(mult, bias)` per channel after an accumulator: layer bias and batch norm, never folded into weights."""
        bias = torch.zeros_like(weight_scale) if layer_bias is None else layer_bias.float()
        if self.bn is None:
            return weight_scale, bias
        factor = torch.rsqrt(self.bn.running_var + self.bn.eps)
        if self.bn.weight is not None:
            factor = self.bn.weight * factor
        shift = (bias - self.bn.running_mean) * factor
        return weight_scale * factor, shift if self.bn.bias is None else shift + self.bn.bias
