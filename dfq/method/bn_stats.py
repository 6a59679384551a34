"""The teacher's batch-norm input statistics during one forward pass, and nothing left behind."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType

import torch
from torch import Tensor, nn

import dfq_kernels
from dfq.method.teacher import BatchNorm, BatchNormAct, measured
from dfq.running import ranks

Layer = BatchNorm | BatchNormAct


class BnStatistics:
    """Context in which every batch norm of a frozen teacher also measures its input.

    Inside, a batch norm's forward is the fused `dfq_kernels.bn_act_stats`; outside, the module is what it was.

    Args:
        teacher: in evaluation mode, with parameters that require no gradient.

    Raises:
        ValueError: no batch norm with stored statistics.
    """

    def __init__(self, teacher: nn.Module) -> None:
        modules = list(teacher.modules())
        inside = {module.bn for module in modules if isinstance(module, BatchNormAct)}
        norms = [module for module in modules if isinstance(module, BatchNorm) and module not in inside]
        self.layers: list[Layer] = [module for module in modules if isinstance(module, BatchNormAct)]
        self.layers += [norm for norm in norms if norm.running_mean is not None]
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

    def _measuring(self, layer: Layer) -> Callable[[Tensor], Tensor]:
        norm, activation = (layer.bn, layer.activation) if isinstance(layer, BatchNormAct) else (layer, None)

        def forward(x: Tensor) -> Tensor:
            out, mean, var = measured(norm, activation, x)
            self._measured.append((norm, mean, var))
            return out

        return forward

    def _of_all_processes(self) -> tuple[list[Tensor], list[Tensor]]:
        """Mean and variance of the whole batch: shares are of one size, so a mean of means is the mean."""
        means, variances = [mean for _, mean, _ in self._measured], [var for _, _, var in self._measured]
        if ranks.world() == 1:
            return means, variances
        sizes, mine = [mean.numel() for mean in means], torch.cat(means)
        mean = ranks.mean(mine)
        variance = ranks.mean(torch.cat(variances) + (mine - mean).square())
        return list(mean.split(sizes)), list(variance.split(sizes))

    def loss(self) -> Tensor:
        """Gaussian KL between the batch's statistics and the stored ones, mean over all channels, in nats."""
        norms = [norm for norm, _, _ in self._measured]
        means, variances = self._of_all_processes()
        total = dfq_kernels.bn_stat_loss(
            means,
            variances,
            [norm.running_mean for norm in norms],  # type: ignore[misc]
            [norm.running_var for norm in norms],  # type: ignore[misc]
            eps=[norm.eps for norm in norms],
        )
        return total / sum(mean.numel() for _, mean, _ in self._measured)
