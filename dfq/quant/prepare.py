"""Float model to fake-quantized fx graph.

What is quantized: the input of every convolution and linear layer, their weights, and every residual stream. A value
that feeds an addition, a batch norm of its own or an average pool is a stream: it is quantized once, and every reader
reads the quantized one; a layer's input is quantized from it, with the layer's bits. Of the two values of an addition,
one that comes straight from a convolution stays an accumulator.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

from torch import fx, nn
from torch.nn import functional as F

from dfq.config import LayerBits, QuantConfig
from dfq.quant.graph import LAYERS, Kind, PrepareError, activation_of, kind_of, trace
from dfq.quant.modules import QuantBatchNorm, QuantConv2d, QuantLinear
from dfq.quant.pooling import average_pool
from dfq.quant.quantizers import ActivationQuantizer, WeightQuantizer, WeightQuantizers


def prepare(model: nn.Module, config: QuantConfig) -> fx.GraphModule:
    """Builds the fake-quantized graph of `model`. Parameters and stored statistics are shared with `model`.

    Args:
        model: a float classifier of one image tensor; convolutions, linear layers, batch norms, ReLU and ReLU6,
            additions, pooling, flattening and dropout, as modules, functions or methods.
        config: bits and schemes.

    Returns:
        A `GraphModule` in training mode; its `eval()` is the exact forward.

    Raises:
        PrepareError: a module or function that has no quantized form, or an override that names no layer.
    """
    return _Builder(model, config).build()


@dataclass(frozen=True)
class _Value:
    """A node of the new graph; `scale` is None where the value is not quantized."""

    node: fx.Node
    scale: fx.Node | None = None


class _Builder:
    def __init__(self, model: nn.Module, config: QuantConfig) -> None:
        self.model, self.config = model, config
        self.nodes = trace(model)
        self.kinds = {node: kind_of(node, model) for node in self.nodes}
        self.layers = [node for node in self.nodes if self.kinds[node] in LAYERS]
        if not self.layers:
            raise PrepareError("prepare: model must have a convolution or a linear layer, got none")
        self.heads, self.tails = self._fuse()
        self._check_overrides()
        self.accumulators = self._choose_accumulators()
        self.streams, self.inputs = self._demands()
        self.graph = fx.Graph()
        self.root = nn.Module()
        self.new: dict[fx.Node, _Value] = {}
        self.requantized: dict[tuple[fx.Node, int], _Value] = {}

    # --- analysis of the float graph ------------------------------------------------------------------------

    def _fuse(self) -> tuple[dict[fx.Node, list[fx.Node]], dict[fx.Node, fx.Node]]:
        """head -> its run of nodes (layer, batch norm, activation) with one reader each; node -> the run's head."""
        heads: dict[fx.Node, list[fx.Node]] = {}
        member: dict[fx.Node, fx.Node] = {}
        for node in self.nodes:
            kind = self.kinds[node]
            if node in member or (kind not in LAYERS and kind is not Kind.BATCH_NORM):
                continue
            run = [node]
            for wanted in (Kind.BATCH_NORM, Kind.ACTIVATION):
                readers = list(run[-1].users)
                if self.kinds[run[-1]] is wanted or len(readers) != 1 or self.kinds.get(readers[0]) is not wanted:
                    continue
                run.append(readers[0])
            heads[node] = run
            member.update((item, node) for item in run)
        return heads, member

    def _check_overrides(self) -> None:
        names = [str(node.target) for node in self.layers]
        for name in self.config.overrides:
            if name not in names:
                raise PrepareError(f"prepare: overrides must name a layer ({', '.join(names)}), got {name!r}")

    def _bits(self, layer: fx.Node) -> LayerBits:
        name = str(layer.target)
        if name in self.config.overrides:
            return self.config.overrides[name]
        if layer is self.layers[0]:
            return self.config.first
        return self.config.last if layer is self.layers[-1] else self.config.bits

    def _choose_accumulators(self) -> dict[fx.Node, fx.Node]:
        """addition -> the operand that stays unquantized: the end of a layer's run, without activation, read once."""
        chosen = {}
        for node in self.nodes:
            if self.kinds[node] is not Kind.ADD:
                continue
            for operand in node.all_input_nodes:
                head = self.tails.get(operand)
                ends = head is not None and self.heads[head][-1] is operand and self.kinds[head] in LAYERS
                if ends and self.kinds[operand] is not Kind.ACTIVATION and len(operand.users) == 1:
                    chosen[node] = operand
                    break
        return chosen

    def _origin(self, node: fx.Node) -> fx.Node:
        """The value behind nodes that only move it (reshape, max pool, dropout)."""
        while self.kinds[node] in (Kind.MOVE, Kind.MAX_POOL):
            node = node.all_input_nodes[0]
        return node

    def _demands(self) -> tuple[dict[fx.Node, int], dict[fx.Node, set[int]]]:
        """Bits of the values that are streams, and the bits that layers want a value's quantized form in."""
        streams: set[fx.Node] = set()
        inputs: dict[fx.Node, set[int]] = {}
        for node in self.nodes:
            kind = self.kinds[node]
            operands = node.all_input_nodes
            if kind in LAYERS:
                inputs.setdefault(self._origin(operands[0]), set()).add(self._bits(node).activations)
            elif kind is Kind.ADD:
                streams.update(self._origin(item) for item in operands if self.accumulators.get(node) is not item)
            elif kind is Kind.AVG_POOL or (kind is Kind.BATCH_NORM and node in self.heads):
                streams.add(self._origin(operands[0]))
        if self.config.activations == "after_relu":
            rectified = [node for node in self.nodes if self.kinds[node] is Kind.ACTIVATION]
            return {node: self._bits_after_relu(inputs.get(node, set())) for node in rectified}, {}
        return dict.fromkeys(streams, self.config.residual_bits), inputs

    def _bits_after_relu(self, wanted: set[int]) -> int:
        """Every reader reads the same quantized value: the bits that the layers among them agree on."""
        return next(iter(wanted)) if len(wanted) == 1 else self.config.bits.activations

    def _never_negative(self, node: fx.Node) -> bool:
        while self.kinds[node] in (Kind.MOVE, Kind.MAX_POOL, Kind.AVG_POOL):
            node = node.all_input_nodes[0]
        return self.kinds[node] is Kind.ACTIVATION

    # --- construction of the new graph ----------------------------------------------------------------------

    def build(self) -> fx.GraphModule:
        placeholder = next(node for node in self.nodes if self.kinds[node] is Kind.INPUT)
        image = self.graph.placeholder(placeholder.name)
        self.weights = self._weights()
        for node in self.nodes:
            kind = self.kinds[node]
            if kind is Kind.INPUT:
                self._settle(node, image)
            elif kind is Kind.OUTPUT:
                self.graph.output(self.new[node.all_input_nodes[0]].node)
            elif node in self.heads:
                self._run(node)
            elif node not in self.tails:
                self._plain(node)
        self.graph.lint()
        return fx.GraphModule(self.root, self.graph)

    def _weights(self) -> dict[fx.Node, tuple[fx.Node, fx.Node]]:
        """One call that fake-quantizes all weights; layer -> (weight, scale)."""
        quantizers = {}
        for node in self.layers:
            module = self.model.get_submodule(str(node.target))
            bits, channels = self._bits(node).weights, module.weight.shape[0]  # type: ignore[union-attr, index]
            quantizers[str(node.target)] = WeightQuantizer(bits, int(channels), self.config.weight_scheme)  # type: ignore[arg-type]
            self._add_module(str(node.target), nn.Module())
            self.root.get_submodule(str(node.target)).weight = module.weight
        self._add_module("weight_quantizers", WeightQuantizers(quantizers))
        arguments = tuple(self.graph.get_attr(f"{name}.weight") for name in quantizers)
        results = self.graph.call_module("weight_quantizers", arguments)
        pairs = {}
        for index, node in enumerate(self.layers):
            pair = self._item(results, index)
            pairs[node] = self._item(pair, 0), self._item(pair, 1)
        return pairs

    def _run(self, head: fx.Node) -> None:
        """A layer or a batch norm with what is fused behind it, and the quantizer where one suffices."""
        run = self.heads[head]
        end = run[-1]
        batch_norm = next((self._module(node) for node in run if self.kinds[node] is Kind.BATCH_NORM), None)
        activation = next(
            (activation_of(node, self.model) for node in run if self.kinds[node] is Kind.ACTIVATION), None
        )
        bits = self._fused_bits(end)
        quantizer = None if bits is None else self._quantizer(bits, signed=not self._never_negative(end))
        train = self.config.batch_norm == "train"
        source = head.all_input_nodes[0]
        module: nn.Module
        if self.kinds[head] is Kind.BATCH_NORM:
            module = QuantBatchNorm(batch_norm, activation, quantizer, train_batch_norm=train)  # type: ignore[arg-type]
            arguments: tuple[fx.Node | None, ...] = (self.new[source].node,)
        else:
            layer = {Kind.CONV: QuantConv2d, Kind.LINEAR: QuantLinear}[self.kinds[head]]
            module = layer(self._module(head), batch_norm, activation, quantizer, train_batch_norm=train)  # type: ignore[arg-type]
            value = self._input(source, self._bits(head).activations)
            arguments = (value.node, value.scale, *self.weights[head])
        self._add_module(str(head.target), module)
        out = self.graph.call_module(str(head.target), arguments)
        if quantizer is None:
            self._settle(end, out)
        else:
            self.new[end] = _Value(self._item(out, 0), self._item(out, 1))

    def _fused_bits(self, end: fx.Node) -> int | None:
        """Bits of the one quantizer that every reader of `end` reads through, if there is one."""
        if end in self.streams:
            return self.streams[end]
        bits = self.inputs.get(end, set())
        readers_are_layers = all(self.kinds[reader] in LAYERS for reader in self._readers(end))
        return next(iter(bits)) if len(bits) == 1 and readers_are_layers else None

    def _readers(self, node: fx.Node) -> list[fx.Node]:
        """Who reads the value, behind nodes that only move it."""
        readers = []
        for user in node.users:
            moves = self.kinds[user] in (Kind.MOVE, Kind.MAX_POOL)
            readers += self._readers(user) if moves else [user] if self.kinds[user] is not Kind.SIZE else []
        return readers

    def _settle(self, node: fx.Node, out: fx.Node) -> None:
        """Registers a raw value, quantized where it is a stream or a layer's input only."""
        bits = self._fused_bits(node)
        self.new[node] = _Value(out)
        if bits is not None:
            self.new[node] = self._quantize(out, node, bits)

    def _input(self, source: fx.Node, bits: int) -> _Value:
        """`source` with the bits that a layer wants."""
        value = self.new[source]
        if self.config.activations == "after_relu" or self._fused_bits(self._origin(source)) == bits:
            return value
        if (source, bits) not in self.requantized:
            self.requantized[source, bits] = self._quantize(value.node, source, bits)
        return self.requantized[source, bits]

    def _quantize(self, out: fx.Node, node: fx.Node, bits: int) -> _Value:
        name = f"quantizers.{node.name}_{bits}"
        self._add_module(name, self._quantizer(bits, signed=not self._never_negative(node)))
        pair = self.graph.call_module(name, (out,))
        return _Value(self._item(pair, 0), self._item(pair, 1))

    def _quantizer(self, bits: int, *, signed: bool) -> ActivationQuantizer:
        return ActivationQuantizer(bits, signed=signed, averaging_constant=self.config.averaging_constant)

    def _plain(self, node: fx.Node) -> None:
        """Additions, activations on their own, pooling, reshaping: as they were, on the new values."""
        operands = node.all_input_nodes
        if self._is_dropout(node):
            self.new[node] = self.new[operands[0]]  # a student learns from agreement alone, and repeats its bits
            return
        if self.kinds[node] is Kind.AVG_POOL:
            name = str(node.target) if node.op == "call_module" else f"pools.{node.name}"
            self._add_module(name, average_pool(node, self.model))
            value = self.new[operands[0]]
            self._settle(node, self.graph.call_module(name, (value.node, value.scale)))
            return
        copied = self._copy(node)
        if self.kinds[node] is Kind.SIZE:
            self.new[node] = _Value(copied)
        elif self.kinds[node] in (Kind.MOVE, Kind.MAX_POOL):
            self.new[node] = _Value(copied, self.new[operands[0]].scale)
        elif self.kinds[node] in (Kind.ADD, Kind.ACTIVATION):
            self._settle(node, copied)
        else:
            raise PrepareError(f"prepare: {node.name} must have a quantized form, got a {self.kinds[node].name}")

    def _copy(self, node: fx.Node) -> fx.Node:
        """The same call on the new values; never in place, because a new value may have more readers than the old."""
        if self.kinds[node] is Kind.ACTIVATION:
            function = {"relu": F.relu, "relu6": F.relu6}[activation_of(node, self.model)]
            return self.graph.call_function(function, (self.new[node.all_input_nodes[0]].node,))
        if self.kinds[node] is Kind.ADD:
            return self.graph.call_function(operator.add, tuple(self.new[item].node for item in node.all_input_nodes))
        if node.op == "call_module":
            self._add_module(str(node.target), self._module(node))
        return self.graph.node_copy(node, lambda old: self.new[old].node)

    def _is_dropout(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return isinstance(self._module(node), (nn.Dropout, nn.Dropout2d))
        return "dropout" in str(getattr(node.target, "__name__", ""))

    def _module(self, node: fx.Node) -> nn.Module:
        return self.model.get_submodule(str(node.target))

    def _item(self, node: fx.Node, index: int) -> fx.Node:
        return self.graph.call_function(operator.getitem, (node, index))

    def _add_module(self, path: str, module: nn.Module) -> None:
        *parents, name = path.split(".")
        owner = self.root
        for parent in parents:
            if not hasattr(owner, parent):
                owner.add_module(parent, nn.Module())
            owner = getattr(owner, parent)
        owner.add_module(name, module)
