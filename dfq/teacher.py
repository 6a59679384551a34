"""The frozen teacher, as it is and as the training steps call it."""

from __future__ import annotations

from copy import copy

import torch
from torch import Tensor, fx, nn

import dfq_kernels
from dfq.quant.graph import Kind, PrepareError, activation_of, kind_or_none, traced

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


def fused(teacher: nn.Module, images: Tensor) -> nn.Module:
    """The frozen teacher as a graph with a `BatchNormAct` for every batch norm and the activation that alone reads it.

    Modules are shared with `teacher`, which stays as it is. A teacher that cannot be traced is given back itself, and
    so is one whose graph is not the same function: other logits of the images, another gradient, other batch norms.
    """
    try:
        graph = traced(teacher)
    except PrepareError:
        return teacher
    norms = {node: graph.get_submodule(str(node.target)) for node in graph.graph.nodes
             if kind_or_none(node, graph) is Kind.BATCH_NORM}  # fmt: skip
    if set(norms.values()) != _called_norms(teacher, images):
        return teacher
    for node, norm in norms.items():
        owner = str(node.target).rpartition(".")[0]
        if owner and graph.get_submodule(owner) is teacher.get_submodule(owner):
            return teacher  # the norm hangs on a layer, which is the teacher's
        reader, activation = next(iter(node.users)), None
        if len(node.users) == 1 and kind_or_none(reader, graph) is Kind.ACTIVATION:
            activation = activation_of(reader, graph)
            reader.replace_all_uses_with(node)
            graph.graph.erase_node(reader)
        graph.set_submodule(str(node.target), BatchNormAct(norm, activation))  # type: ignore[arg-type]
    graph.recompile()
    return graph if _same_function(graph, teacher, images) else teacher


def with_weights_in(graph: nn.Module, teacher: nn.Module, dtype: torch.dtype) -> nn.Module:
    """`graph`, which `fused` made, with the weights that autocast would cast to `dtype` at every call.

    They are frozen, so once is enough, and the results are the same bits. The teacher keeps its own weights; what is no
    graph stays as it is.
    """
    nodes = list(graph.graph.nodes) if isinstance(graph, fx.GraphModule) and graph is not teacher else []
    read = {str(node.target).rpartition(".")[0] for node in nodes if node.op == "get_attr"}
    for name in {str(node.target) for node in nodes if node.op == "call_module"} - read:
        layer, owner = graph.get_submodule(name), name.rpartition(".")[0]
        watched = layer._forward_hooks or layer._forward_pre_hooks
        shared = owner and graph.get_submodule(owner) is teacher.get_submodule(owner)
        if type(layer) not in (nn.Conv2d, nn.Linear) or watched or shared or layer.weight.dtype != torch.float32:
            continue
        own = copy(layer)
        own._parameters = {
            key: value if value is None else nn.Parameter(value.to(dtype), requires_grad=False)
            for key, value in layer._parameters.items()
        }
        graph.set_submodule(name, own)
    return graph


def _called_norms(teacher: nn.Module, images: Tensor) -> set[nn.Module]:
    called: set[nn.Module] = set()
    norms = [module for module in teacher.modules() if isinstance(module, BatchNorm)]
    handles = [norm.register_forward_hook(lambda module, *_: called.add(module)) for norm in norms]
    with torch.no_grad():
        teacher(images)
    for handle in handles:
        handle.remove()
    return called


def _same_function(one: nn.Module, other: nn.Module, images: Tensor) -> bool:
    """Logits, and a gradient of the images, but for rounding."""
    results = []
    for model in (one, other):
        x = images.detach().clone().requires_grad_()
        logits = model(x)
        if not logits.requires_grad:
            return False
        results.append((logits, *torch.autograd.grad(logits.square().sum(), x)))
    return all(bool((a - b).norm() <= 1e-3 * b.norm()) for a, b in zip(*results, strict=True))
