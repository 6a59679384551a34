"""The teacher's batch-norm input statistics during one forward pass, and nothing left behind."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType

import torch
from torch import Tensor, nn

import dfq_kernels

BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d


class BnStatistics:
    """Context in which every batch norm of a frozen teacher also measures its input.

    Inside, a batch norm's forward is the fused `dfq_kernels.bn_act_stats`; outside, the module is what it was.

    Args:
        teacher: in evaluation mode, with parameters that require no gradient.

    Raises:
        ValueError: no batch norm with stored statistics.
    """

    def __init__(self, teacher: nn.Module) -> None:
        self.layers = [module for module in teacher.modules() if isinstance(module, BatchNorm)]
        self.layers = [layer for layer in self.layers if layer.running_mean is not None]
        if not self.layers:
            raise ValueError(
                "BnStatistics: teacher must have batch norms with stored statistics (the method draws its images from "
                "them), got none"
            )
        self._forwards = [self._measuring(layer) for layer in self.layers]  # the same ones always: a compiler looks

    def __enter__(self) -> BnStatistics:
        self._measured: list[tuple[BatchNorm, Tensor, Tensor]] = []
        for layer, forward in zip(self.layers, self._forwards, strict=True):
            layer.forward = forward  # type: ignore[method-assign, assignment]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for layer in self.layers:
            del layer.forward  # the instance's own; the class's shows again
        self._measured = []

    def _measuring(self, layer: BatchNorm) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            assert layer.running_mean is not None and layer.running_var is not None
            out, mean, var = dfq_kernels.bn_act_stats(
                x, layer.weight, layer.bias, layer.running_mean, layer.running_var, eps=layer.eps, activation=None
            )
            self._measured.append((layer, mean, var))
            return out

        return forward

    def loss(self) -> Tensor:
        """Gaussian KL between the batch's statistics and the stored ones, mean over all channels, in nats."""
        layers = [layer for layer, _, _ in self._measured]
        total = dfq_kernels.bn_stat_loss(
            [mean for _, mean, _ in self._measured],
            [var for _, _, var in self._measured],
            [layer.running_mean for layer in layers],  # type: ignore[misc]
            [layer.running_var for layer in layers],  # type: ignore[misc]
            eps=[layer.eps for layer in layers],
        )
        return total / sum(mean.numel() for _, mean, _ in self._measured)


def freeze(teacher: nn.Module) -> nn.Module:
    """Evaluation mode, no gradients for parameters, channels-last."""
    teacher.eval().requires_grad_(False)
    return teacher.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
