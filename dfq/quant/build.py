"""The fake-quantized network of a captured one: layers, quantizers, and calls that are copied as they are."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from dfq.config import QuantConfig
from dfq.layers import Float, Tail, Weighted
from dfq.layers.batch_norm import stored_norm
from dfq.network import Network, PrepareError
from dfq.network.calls import MODULE, is_size
from dfq.quant.demands import Demands
from dfq.quant.quantizers import ActivationQuantizer, WeightQuantizer, WeightQuantizers

RESERVED = ("weight_quantizers", "quantizers", "calls", "constants")
"""Submodules of the new network that are not the model's."""
KIND = "dfq_kind"  # where a node's meta keeps the kind of the call that was copied to it
_EMPTY = fx.GraphModule(nn.Module(), fx.Graph())


@dataclass(frozen=True)
class _Value:
    """A node of the new graph; `scale` is None where the value is not quantized."""

    node: fx.Node
    scale: fx.Node | None = None


class Builder:
    """Makes the network once; see `dfq.quant.prepare`."""

    def __init__(self, network: Network, config: QuantConfig, demands: Demands) -> None:
        self.network, self.config, self.demands = network, config, demands
        self.graph, self.root = fx.Graph(), nn.Module()
        self.new: dict[fx.Node, _Value] = {}
        self.requantized: dict[tuple[fx.Node, int], _Value] = {}

    def build(self) -> fx.GraphModule:
        first = [node for node in self.network.graph.nodes if node.op == "placeholder"]
        image = self.graph.placeholder(first[0].name)
        image.meta |= first[0].meta
        self.weights = self._weights()
        for node in self.network.graph.nodes:
            if node.op == "placeholder":
                self._settle(node, image)
            elif node.op == "output":
                self._output(node)
            elif node in self.demands.heads:
                self._run(node)
            elif node.op == "call_function" and node not in self.demands.member:
                self._copy(node)
        self.graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
        self.graph.lint()
        return fx.GraphModule(self.root, self.graph)

    # --- weights --------------------------------------------------------------------------------------------------

    def _weights(self) -> dict[fx.Node, tuple[fx.Node, fx.Node]]:
        """One call that fake-quantizes all weights; layer -> (weight, scale)."""
        quantizers, arguments = {}, []
        for node, name in self.demands.layers.items():
            kind, call = self.demands.kinds[node], self.demands.calls[node]
            assert isinstance(kind, Weighted)
            self._check_name(name)
            holder, parameter = nn.Module(), kind.weight(call)
            holder.weight = parameter
            self._add_module(name, holder)
            oriented = kind.oriented(call, parameter.detach())
            quantizers[name] = WeightQuantizer(
                self.demands.bits(node).weights, int(oriented.shape[0]), self.config.weight_scheme
            )
            arguments.append(kind.oriented(call, self.graph.get_attr(f"{name}.weight")))
        self._add_module("weight_quantizers", WeightQuantizers(quantizers))
        results = self.graph.call_module("weight_quantizers", tuple(arguments))
        pairs = {}
        for index, node in enumerate(self.demands.layers):
            pair = self._item(results, index)
            pairs[node] = self._item(pair, 0), self._item(pair, 1)
        return pairs

    # --- layers ---------------------------------------------------------------------------------------------------

    def _run(self, head: fx.Node) -> None:
        """A layer with what it ends with, and the quantizer where one suffices."""
        demands, run = self.demands, self.demands.heads[head]
        kind, call, end = demands.kinds[head], demands.calls[head], run[-1]
        bits = demands.settled_bits(end)
        quantizer = None if bits is None else self._quantizer(bits, end)
        norm = next((node for node in run if demands.kinds[node].normalizes), None)
        endings = [node for node in run if demands.kinds[node].activation]
        tail = Tail(
            None if norm is None else stored_norm(demands.calls[norm], self._owner(norm)),
            demands.kinds[endings[0]].text(demands.calls[endings[0]]) if endings else None, quantizer,
            train_batch_norm=self.config.batch_norm == "train",
        )  # fmt: skip
        arguments: list[fx.Node | None] = []
        for operand, read in zip(call.operands, demands.reads(head), strict=True):
            value = self._input(operand, read) if isinstance(read, int) else self.new[operand]
            arguments += [value.node, value.scale]
        if isinstance(kind, Weighted):
            kept = self.root.get_submodule(demands.layers[head])
            module = kind.layer(call, tail)
            module.weight = kept.weight  # a weight that is no parameter of the model became one only once
            path, arguments = demands.layers[head], [*arguments, *self.weights[head]]
        else:
            module, path = kind.layer(call, tail), f"calls.{head.name}"
        self._add_module(path, module)
        out = self.graph.call_module(path, tuple(arguments))
        out.meta |= end.meta
        self.new[end] = _Value(out) if quantizer is None else self._parts(out, end)

    def _owner(self, node: fx.Node) -> nn.Module | None:
        """The user's batch norm that made the call, if it is a module of torch's."""
        module = self.network.modules.get(str(node.meta.get(MODULE, "")))
        return module if isinstance(module, nn.modules.batchnorm._BatchNorm) else None

    def _settle(self, node: fx.Node, out: fx.Node) -> None:
        """Registers a raw value, quantized where all of its readers want it so."""
        bits = self.demands.settled_bits(node)
        self.new[node] = _Value(out) if bits is None else self._quantize(out, node, bits)

    def _input(self, source: fx.Node, bits: int) -> _Value:
        """`source` with the bits that its reader wants."""
        value = self.new[source]
        if self.config.activations == "after_relu" or self.demands.settled_bits(self.demands.origin(source)) == bits:
            return value
        if (source, bits) not in self.requantized:
            self.requantized[source, bits] = self._quantize(value.node, source, bits)
        return self.requantized[source, bits]

    def _quantize(self, out: fx.Node, node: fx.Node, bits: int) -> _Value:
        name = f"quantizers.{node.name}_{bits}"
        self._add_module(name, self._quantizer(bits, node))
        pair = self.graph.call_module(name, (out,))
        return self._parts(pair, node)

    def _parts(self, pair: fx.Node, node: fx.Node) -> _Value:
        """The value and the scale of what gives both."""
        value = self._item(pair, 0)
        value.meta |= node.meta
        return _Value(value, self._item(pair, 1))

    def _quantizer(self, bits: int, node: fx.Node) -> ActivationQuantizer:
        signed = not self.demands.never_negative(node)
        return ActivationQuantizer(bits, signed=signed, averaging_constant=self.config.averaging_constant)

    # --- what is copied -------------------------------------------------------------------------------------------

    def _copy(self, node: fx.Node) -> None:
        """The same call on the new values."""
        copied = self.graph.node_copy(node, self._as_argument)
        copied.meta |= node.meta
        if node in self.demands.kinds:
            copied.meta[KIND] = self.demands.kinds[node]
        if is_size(node) or isinstance(self.demands.kinds[node], Float):
            self.new[node] = _Value(copied)
            value = node.meta.get("val")
            if isinstance(value, Tensor) and value.is_floating_point():
                self._settle(node, copied)
        elif self.demands.keeps_grid(node):
            self.new[node] = _Value(copied, self.new[self.demands.calls[node].operands[0]].scale)
        else:
            self._settle(node, copied)

    def _as_argument(self, old: fx.Node) -> fx.Node:
        if old.op != "get_attr":
            return self.new[old].node
        name = str(old.target)
        if not name.startswith("constants."):
            self._check_name(name)
        *parents, leaf = name.split(".")
        owner = self._container(parents)
        if not hasattr(owner, leaf):
            value: Any = self.network.tensors[name]
            if isinstance(value, (nn.Parameter, nn.Module)):
                setattr(owner, leaf, value)
            else:
                owner.register_buffer(leaf, value)
        return self.graph.get_attr(name)

    def _output(self, node: fx.Node) -> None:
        outputs: Any = node.args[0]
        leaves = [self._leaf(item) if isinstance(item, fx.Node) else item for item in outputs]
        nested = pytree.tree_unflatten(leaves, self.network.structure)
        known = pytree.tree_structure(nested, is_leaf=lambda item: isinstance(item, fx.Node))
        plain = isinstance(nested, (tuple, list, dict, fx.Node)) and known.num_leaves == len(leaves)
        self.graph.output(nested if plain else tuple(leaves))

    def _leaf(self, item: fx.Node) -> fx.Node:
        return self._as_argument(item) if item.op == "get_attr" else self.new[item].node

    # --- modules --------------------------------------------------------------------------------------------------

    def _item(self, node: fx.Node, index: int) -> fx.Node:
        return self.graph.call_function(operator.getitem, (node, index))

    def _check_name(self, name: str) -> None:
        """Of a module or a tensor of the model."""
        first = name.split(".")[0]
        if first in RESERVED or hasattr(_EMPTY, first):
            rule = "a submodule must not have a name of the quantized graph's own"
            raise PrepareError(f"prepare: {rule}, got {first!r}")

    def _container(self, parents: list[str]) -> nn.Module:
        owner = self.root
        for parent in parents:
            if not hasattr(owner, parent):
                owner.add_module(parent, nn.Module())
            owner = getattr(owner, parent)
        return owner

    def _add_module(self, path: str, module: nn.Module) -> None:
        *parents, name = path.split(".")
        owner = self._container(parents)
        held = getattr(owner, name, None)
        if isinstance(held, nn.Module):  # a layer that other layers lie in
            for child, inner in held.named_children():
                module.add_module(child, inner)
        setattr(owner, name, module)
