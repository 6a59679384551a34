"""The frozen teacher, as it is and as the training steps call it."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

import dfq_kernels
from dfq.quant.graph import Kind, PrepareError, activation_of, kind_or_none, trace

BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d


class BatchNormAct(nn.Module):
    """A frozen batch norm and the activation behind it (None: none) in one call."""

    def __init__(self, batch_norm: BatchNorm, activation: str | None) -> None:
        super().__init__()
        self.bn, self.activation = batch_norm, activation

    def forward(self, x: Tensor) -> Tensor:
        return measured(self.bn, self.activation, x)[0]


def measured(bn: BatchNorm, activation: str | None, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`(out, mean, var)` of `dfq_kernels.bn_act_stats`."""
    assert bn.running_mean is not None and bn.running_var is not None
    stored = (bn.running_mean, bn.running_var)
    return dfq_kernels.bn_act_stats(x, bn.weight, bn.bias, *stored, eps=bn.eps, activation=activation)


def freeze(teacher: nn.Module) -> nn.Module:
    """Evaluation mode, no gradients for parameters, channels-last."""
    teacher.eval().requires_grad_(False)
    return teacher.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def fused(teacher: nn.Module) -> nn.Module:
    """The frozen teacher with a `BatchNormAct` for every batch norm and the activation that alone reads it.

    Modules are shared with `teacher`, which stays as it is. A teacher that cannot be traced is given back itself.
    """
    try:
        nodes = trace(teacher)
    except PrepareError:
        return teacher
    graph = fx.GraphModule(teacher, nodes[0].graph)
    for node in nodes:
        norm = teacher.get_submodule(str(node.target)) if kind_or_none(node, teacher) is Kind.BATCH_NORM else None
        if not isinstance(norm, BatchNorm) or norm.running_mean is None:
            continue
        reader, activation = next(iter(node.users)), None
        if len(node.users) == 1 and kind_or_none(reader, teacher) is Kind.ACTIVATION:
            activation = activation_of(reader, teacher)
            reader.replace_all_uses_with(node)
            graph.graph.erase_node(reader)
        graph.set_submodule(str(node.target), BatchNormAct(norm, activation))
    graph.recompile()
    return graph
