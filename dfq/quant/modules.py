"""The layers of a fake-quantized graph.

In training a layer runs on fake-quantized values, fast and differentiable. In evaluation it runs the **exact forward**:
convolutions on integer-valued tensors, then one multiplier and one bias per channel, as the integer network will.
Values travel as `(fake-quantized value, scale)`; a scale of None marks a value that is not quantized.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dfq_kernels
from dfq.quant.quantizers import ActivationQuantizer, synchronizes

EXACT_LIMIT = 2.0**24  # sums of integers up to here are exact in fp32, in any order

BatchNorm = nn.BatchNorm2d | nn.BatchNorm1d
Activated = Tensor | tuple[Tensor, Tensor]


class QuantLayer(nn.Module):
    """What `QuantConv2d` and `QuantLinear` share: weight, bias, and the batch norm, activation and quantizer behind."""

    def __init__(
        self,
        layer: nn.Conv2d | nn.Linear,
        batch_norm: BatchNorm | None,
        activation: str | None,
        quantizer: ActivationQuantizer | None,
        *,
        train_batch_norm: bool,
    ) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.tail = Tail(batch_norm, activation, quantizer, train_batch_norm=train_batch_norm)

    channel_axis = 1

    def accumulate(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The linear map of the layer."""
        raise TypeError(f"{type(self).__name__} must define accumulate")

    def forward(self, x: Tensor, x_scale: Tensor | None, weight: Tensor, weight_scale: Tensor) -> Activated:
        if self.training:
            return self.tail(self.fake_quantized(x, x_scale, weight, weight_scale))
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            return self.tail.finish(self.exact(x.float(), x_scale, weight, weight_scale))

    def fake_quantized(self, x: Tensor, x_scale: Tensor | None, weight: Tensor, weight_scale: Tensor) -> Tensor:
        """The layer on fake-quantized values, differentiable."""
        return self.accumulate(x, weight, self.bias)

    def exact(self, x: Tensor, x_scale: Tensor | None, weight: Tensor, weight_scale: Tensor) -> Tensor:
        """`float(acc) * mult + bias`, with the batch norm in both constants."""
        axis = self.channel_axis % x.dim()
        if self.tail.bn is not None and axis != 1:
            raise ValueError(
                f"prepare: a linear layer before a batch norm must see [N, features], got {tuple(x.shape)}"
            )
        mult, bias = self.tail.constants(self.bias, weight_scale)
        integer_weight = torch.round(weight / per_channel(weight_scale, weight, 0))
        if x_scale is None:  # an input that is not quantized: nothing to be exact about
            acc = self.accumulate(x, integer_weight, None)
        else:
            integer_x = torch.round(x * (1 / x_scale))
            acc = self.accumulate_integers(integer_x, integer_weight)
            mult = x_scale * mult
        return acc * per_channel(mult, acc, axis) + per_channel(bias, acc, axis)

    def accumulate_integers(self, x: Tensor, weight: Tensor) -> Tensor:
        """The exact accumulators as fp32; float64 where partial sums could pass 2^24, and always on a GPU.

        (cuDNN may pick a Winograd or a TF32 algorithm for fp32; its float64 results are off by far less than a half.)
        """
        rows = weight.detach().flatten(1).abs().sum(1)
        bound = float(x.detach().abs().max()) * float(rows.max()) if x.numel() else 0.0
        if bound < EXACT_LIMIT and x.device.type == "cpu":
            with torch.backends.nnpack.flags(enabled=False):  # its Winograd convolutions are not exact
                return self.accumulate(x, weight, None)
        return torch.round(self.accumulate(x.double(), weight.double(), None)).float()


class QuantConv2d(QuantLayer):
    """A convolution whose weight arrives fake-quantized; padding inserts the zero point, which is 0 here."""

    def __init__(self, layer: nn.Conv2d, *args: object, train_batch_norm: bool) -> None:
        super().__init__(layer, *args, train_batch_norm=train_batch_norm)  # type: ignore[arg-type]
        self.stride, self.padding = layer.stride, layer.padding
        self.dilation, self.groups = layer.dilation, layer.groups

    def accumulate(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def fake_quantized(self, x: Tensor, x_scale: Tensor | None, weight: Tensor, weight_scale: Tensor) -> Tensor:
        if x_scale is None or isinstance(self.padding, str):
            return self.accumulate(x, weight, self.bias)
        kind = x.device.type
        autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        return dfq_kernels.fake_quant_conv2d(
            x, x_scale, weight, weight_scale, self.bias, stride=self.stride, padding=self.padding,
            dilation=self.dilation, groups=self.groups,
            dtype=torch.get_autocast_dtype(kind) if autocast and x.dtype != torch.float64 else None,
        )  # fmt: skip


class QuantLinear(QuantLayer):
    """A linear layer whose weight arrives fake-quantized."""

    channel_axis = -1

    def accumulate(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)


class Tail(nn.Module):
    """Batch norm, activation and quantizer behind a layer or on their own, each optional."""

    def __init__(
        self,
        batch_norm: BatchNorm | None,
        activation: str | None,
        quantizer: ActivationQuantizer | None,
        *,
        train_batch_norm: bool,
    ) -> None:
        super().__init__()
        self.bn, self.activation, self.quantizer = batch_norm, activation, quantizer
        self.train_batch_norm, self.adapting = train_batch_norm, False

    def forward(self, x: Tensor) -> Activated:
        if self.bn is None:
            return self.finish(x)
        training = self.training and self.adapting and self.train_batch_norm
        averaged = training and self.bn.momentum is None  # over all batches, as torch does then
        stored = self._stored()
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
        quantizer = self.quantizer
        if quantizer is None or (quantizer.observing and synchronizes()):
            out = F.batch_norm(x, mean, var, self.bn.weight, self.bn.bias, training, momentum, self.bn.eps)
            return self.finish(out)
        scale = quantizer.current_scale()
        out = dfq_kernels.bn_act_fake_quant(
            x, self.bn.weight, self.bn.bias, mean, var, quantizer.running_min, quantizer.running_max,
            scale, quantizer.zero_point, training=training, momentum=momentum, eps=self.bn.eps,
            activation=self.activation, observe=quantizer.observing, averaging_constant=quantizer.averaging_constant,
            quant_min=quantizer.quant_min, quant_max=quantizer.quant_max,
        )  # fmt: skip
        return out, scale

    def finish(self, x: Tensor) -> Activated:
        """Activation and quantizer only: the batch norm is in the constants already, or there is none."""
        out = self._activate(x)
        return out if self.quantizer is None else self.quantizer(out)

    def constants(self, layer_bias: Tensor | None, weight_scale: Tensor) -> tuple[Tensor, Tensor]:
        """`(mult, bias)` per channel behind an accumulator: layer bias and batch norm, never folded into weights."""
        bias = torch.zeros_like(weight_scale) if layer_bias is None else layer_bias.float()
        if self.bn is None:
            return weight_scale, bias
        mean, var = self._stored()
        factor = torch.rsqrt(var + self.bn.eps)
        if self.bn.weight is not None:
            factor = self.bn.weight * factor
        shift = (bias - mean) * factor
        return weight_scale * factor, shift if self.bn.bias is None else shift + self.bn.bias

    def _stored(self) -> tuple[Tensor, Tensor]:
        if self.bn is None or self.bn.running_mean is None or self.bn.running_var is None:
            raise RuntimeError("a batch norm without stored statistics passed prepare()")
        return self.bn.running_mean, self.bn.running_var

    def _activate(self, x: Tensor) -> Tensor:
        if self.activation == "relu":
            return F.relu(x)
        if self.activation == "relu6":
            return x.clamp(0, 6)
        if self.activation is not None:
            raise ValueError(f"prepare: activation must be None, relu or relu6, got {self.activation!r}")
        return x


class QuantBatchNorm(Tail):
    """A batch norm that stands before its convolution; in evaluation the same arithmetic with stored statistics."""

    def forward(self, x: Tensor) -> Activated:
        if self.training:
            return super().forward(x)
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            if self.quantizer is not None:
                return super().forward(x.float())
            assert self.bn is not None
            out, _, _ = dfq_kernels.bn_act_stats(
                x.float(), self.bn.weight, self.bn.bias, *self._stored(), eps=self.bn.eps, activation=self.activation
            )
            return out


def per_channel(values: Tensor, like: Tensor, axis: int) -> Tensor:
    """`values` shaped to broadcast along `axis`."""
    return values.reshape([-1 if dim == axis else 1 for dim in range(like.dim())])
