"""The frozen teacher, as it is and as the training steps call it."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

import dfq_kernels
from dfq.layers import BatchNorm as BatchNormKind
from dfq.layers import kind_of
from dfq.layers.batch_norm import stored_norm
from dfq.layers.tail import FUSED, StoredNorm
from dfq.network import Call, Network
from dfq.network.calls import is_value

BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | StoredNorm
_MULTIPLIES = ("aten.conv1d.default", "aten.conv2d.default", "aten.conv2d.padding", "aten.linear.default",
               "aten.conv_transpose2d.input")  # fmt: skip


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


def teacher_graph(network: Network, dtype: torch.dtype | None = None) -> fx.GraphModule:
    """The captured, frozen teacher with a `BatchNormAct` for every batch norm and the activation that alone reads it.

    Args:
        network: of the teacher, whose tensors it shares.
        dtype: what autocast would cast the weights of convolutions and linear layers to at every call; they are frozen,
            so once is enough, and the results are the same bits.
    """
    root, graph = nn.Module(), fx.Graph()
    new: dict[fx.Node, fx.Node] = {}
    cast = _cast_once(network, dtype)
    for node in network.graph.nodes:
        if node in new:
            continue
        if node.op == "get_attr":
            new[node] = _held(root, graph, network, node, cast.get(node))
        elif node.op == "output":
            nested = pytree.tree_unflatten([new[item] if isinstance(item, fx.Node) else item for item in node.args[0]],
                                           network.structure)  # fmt: skip
            graph.output(nested)
        elif (end := _batch_norm(network, node)) is not None:
            norm, activation, last = end
            root.add_module(f"norm_{node.name}", BatchNormAct(norm, activation))
            new[node] = new[last] = graph.call_module(f"norm_{node.name}", (new[node.args[0]],))  # type: ignore[index]
        else:
            new[node] = graph.node_copy(node, lambda item: new[item])
    return fx.GraphModule(root, graph).requires_grad_(False).eval()


def _batch_norm(network: Network, node: fx.Node) -> tuple[StoredNorm, str | None, fx.Node] | None:
    """A batch norm's parameters, the activation that alone reads it, and the last of both calls; None: another call."""
    if node.op != "call_function" or not is_value(node):
        return None
    call = Call(node, network.tensors)
    if not isinstance(kind_of(call), BatchNormKind):
        return None
    readers = list(node.users)
    reader = Call(readers[0], network.tensors) if len(readers) == 1 and readers[0].op == "call_function" else None
    kind = None if reader is None else kind_of(reader)
    text = kind.text(reader) if kind is not None and reader is not None and kind.activation else None
    fused = text is not None and text in FUSED
    return stored_norm(call, None), text if fused else None, readers[0] if fused else node


def _cast_once(network: Network, dtype: torch.dtype | None) -> dict[fx.Node, torch.dtype]:
    """The weights and biases that only multiplying calls read."""
    if dtype is None:
        return {}
    nodes = [node for node in network.graph.nodes if node.op == "get_attr"]
    return {
        node: dtype
        for node in nodes
        if all(reader.op == "call_function" and str(reader.target) in _MULTIPLIES for reader in node.users)
        and network.tensors[str(node.target)].dtype == torch.float32
    }


def _held(root: nn.Module, graph: fx.Graph, network: Network, node: fx.Node, dtype: torch.dtype | None) -> fx.Node:
    name, value = f"tensor_{node.name}", network.tensors[str(node.target)]
    if isinstance(value, nn.Module):
        root.add_module(name, value)
        return graph.get_attr(name)
    value = value if dtype is None else value.detach().to(dtype)
    if isinstance(value, nn.Parameter):
        root.register_parameter(name, value)
    else:
        root.register_buffer(name, value)
    return graph.get_attr(name)
