"""The training step's operators as people have them: torch.ao's modules, and forward hooks for the statistics.

`FusedMovingAvgObsFakeQuantize` takes fp32 alone: values are converted around it, as its users must.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.ao.quantization import (
    FusedMovingAvgObsFakeQuantize,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
)
from torch.nn import functional as F

from dfq.method.bn_stats import BnStatistics


class HookStatistics(BnStatistics):
    """The batch norms' input statistics by forward pre-hooks, and the loss layer by layer.

    Hooks that come and go would be compiled again at every step; these stay.
    """

    def __init__(self, teacher: nn.Module) -> None:
        super().__init__(teacher)
        self.looking, self.seen = False, list[tuple[Any, Tensor, Tensor]]()
        for layer in self.layers:
            layer.register_forward_pre_hook(self._look)

    def __enter__(self) -> HookStatistics:
        self.looking, self.seen = True, []
        return self

    def __exit__(self, *_: object) -> None:
        self.looking = False

    def _look(self, layer: Any, inputs: tuple[Tensor, ...]) -> None:
        if not self.looking:
            return
        var, mean = torch.var_mean(inputs[0].float(), (0, 2, 3), unbiased=False)
        self.seen.append((layer, mean, var))

    def loss(self) -> Tensor:
        terms = []
        for layer, mean, var in self.seen:
            batch, stored = var.clamp(min=layer.eps), layer.running_var.clamp(min=layer.eps)
            ratio = (((mean - layer.running_mean) ** 2 + batch) / (2 * stored)) - 0.5 * torch.log(batch / stored) - 0.5
            terms.append(ratio.sum())
        return torch.stack(terms).sum() / sum(mean.numel() for _, mean, _ in self.seen)


class TorchAo:
    """The operators that a fake-quantized student calls, made of torch.ao's modules, one for each range."""

    def __init__(self) -> None:
        self.modules: dict[int, Any] = {}

    def fake_quant(
        self, x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, axis: int | None = None
    ) -> Tensor:
        """With a learned scale, what torch.ao's `_LearnableFakeQuantize` calls."""
        bounds = (quant_min, quant_max, 1.0)
        if axis is not None:
            return torch._fake_quantize_learnable_per_channel_affine(x, scale, zero_point, axis, *bounds)
        if scale.requires_grad:
            learned = scale.reshape(1), zero_point.reshape(1)
            return torch._fake_quantize_learnable_per_tensor_affine(x.float(), *learned, *bounds).to(x.dtype)
        whole = zero_point.to(torch.int32)
        return torch.fake_quantize_per_tensor_affine(x.float(), scale, whole, quant_min, quant_max).to(x.dtype)

    def observe_fake_quant(
        self, x: Tensor, running_min: Tensor, running_max: Tensor, *_: Tensor, quant_min: int, quant_max: int,
        averaging_constant: float,
    ) -> Tensor:  # fmt: skip
        """A new module starts from the range that calibration left."""
        if id(running_min) not in self.modules:
            dtype = torch.qint8 if quant_min < 0 else torch.quint8
            module = FusedMovingAvgObsFakeQuantize(
                MovingAverageMinMaxObserver, quant_min, quant_max, dtype=dtype, averaging_constant=averaging_constant
            )
            module.activation_post_process.min_val.copy_(running_min)
            module.activation_post_process.max_val.copy_(running_max)
            self.modules[id(running_min)] = module
        return self.modules[id(running_min)](x.float()).to(x.dtype)

    def bn_act_fake_quant(
        self, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, running_min: Tensor,
        running_max: Tensor, scale: Tensor, zero_point: Tensor, *, training: bool, momentum: float, eps: float,
        activation: str | None, observe: bool, averaging_constant: float, **bounds: int,
    ) -> Tensor:  # fmt: skip
        out = F.batch_norm(x, mean, var, weight, bias, training, momentum, eps)
        out = F.relu(out) if activation == "relu" else out
        if not observe:
            return self.fake_quant(out, scale, zero_point, **bounds)
        return self.observe_fake_quant(out, running_min, running_max, averaging_constant=averaging_constant, **bounds)

    def fake_quant_conv2d(
        self, x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, *,
        dtype: torch.dtype | None, **geometry: Any,
    ) -> Tensor:  # fmt: skip
        """Autocast sees to the type."""
        return F.conv2d(x, weight, bias, **geometry)

    def fake_quant_weights(
        self, weights: Sequence[Tensor], bits: Sequence[int], *, dtype: torch.dtype | None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Autocast sees to the type."""
        outs, scales = [], []
        for weight, width in zip(weights, bits, strict=True):
            if id(weight) not in self.modules:
                bound = 2 ** (width - 1) - 1
                self.modules[id(weight)] = FusedMovingAvgObsFakeQuantize(
                    MovingAveragePerChannelMinMaxObserver, -bound, bound, dtype=torch.qint8, ch_axis=0,
                    qscheme=torch.per_channel_symmetric, averaging_constant=1.0,
                )  # fmt: skip
            outs.append(self.modules[id(weight)](weight))
            scales.append(self.modules[id(weight)].scale)
        return outs, scales

    @contextmanager
    def in_place_of_ours(self) -> Iterator[None]:
        """Inside, whoever calls `dfq_kernels` gets these."""
        names = (
            "fake_quant", "observe_fake_quant", "bn_act_fake_quant", "fake_quant_conv2d", "fake_quant_weights",
        )  # fmt: skip
        with mock.patch.multiple("dfq_kernels", **{name: getattr(self, name) for name in names}):
            yield
