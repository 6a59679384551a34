"""Who reads which value of a captured network how: what has to be quantized, and with how many bits."""

from __future__ import annotations

from torch import fx

from dfq.config import LayerBits, QuantConfig
from dfq.layers import AS_IT_IS, ON_A_GRID, STREAM, Float, Kind, kind_of
from dfq.layers.kind import Read
from dfq.network import Call, Network, PrepareError
from dfq.network.calls import is_value


class Demands:
    """What all kinds of a network want together.

    calls, kinds: of every call on values, in order. heads: a call that becomes a layer, and the run of calls that it
    ends with (batch norm, activation); member: the head of every call of a run. accumulators: the value of an addition
    that stays a layer's sums. streams: values with the bits in which all readers see them.

    Raises:
        PrepareError: nothing to quantize, or an override that names no layer.
    """

    def __init__(self, network: Network, config: QuantConfig) -> None:
        self.network, self.config = network, config
        nodes = [node for node in network.graph.nodes if node.op == "call_function" and is_value(node)]
        self.calls = {node: Call(node, network.tensors) for node in nodes}
        self.kinds: dict[fx.Node, Kind] = {node: kind_of(call) for node, call in self.calls.items()}
        self.layers = {node: "" for node in nodes if self.kinds[node].weighted}
        if not self.layers:
            raise PrepareError("prepare: model must have a convolution or a linear layer, got none")
        self._name_layers()
        self._check_overrides()
        self.heads, self.member = self._runs()
        self.accumulators = self._choose_accumulators()
        self._readings: dict[fx.Node, list[Read]] = {}
        self._collect()
        self.streams = self._streams()
        self._signless = self._never_negative()

    # --- names and bits -------------------------------------------------------------------------------------------

    def _name_layers(self) -> None:
        """By the parameter where the layer's weight is one, else by the module that made the call."""
        taken: set[str] = set()
        for node in self.layers:
            weight = self.calls[node].arguments()["weight"]
            owner, _, leaf = str(weight.target).rpartition(".")
            name = owner if leaf == "weight" and owner != "constants" and owner else self.calls[node].module
            name = unique = name or node.name
            count = 1
            while unique in taken:
                unique, count = f"{name}_{count}", count + 1
            taken.add(unique)
            self.layers[node] = unique

    def _check_overrides(self) -> None:
        names = list(self.layers.values())
        for name in self.config.overrides:
            if name not in names:
                raise PrepareError(f"prepare: overrides must name a layer ({', '.join(names)}), got {name!r}")

    def bits(self, layer: fx.Node) -> LayerBits:
        name, order = self.layers[layer], list(self.layers)
        if name in self.config.overrides:
            return self.config.overrides[name]
        if layer is order[0]:
            return self.config.first
        return self.config.last if layer is order[-1] else self.config.bits

    # --- runs -----------------------------------------------------------------------------------------------------

    def is_step(self, node: fx.Node) -> bool:
        """Whether a call becomes a layer of the quantized network."""
        kind = self.kinds.get(node)
        if kind is None or isinstance(kind, Float) or kind.moves:
            return False
        call = self.calls[node]
        return not kind.keeps_grid(call) and kind.ends(call) is None

    def _runs(self) -> tuple[dict[fx.Node, list[fx.Node]], dict[fx.Node, fx.Node]]:
        heads: dict[fx.Node, list[fx.Node]] = {}
        member: dict[fx.Node, fx.Node] = {}
        for node in self.calls:
            if node in member or not self.is_step(node):
                continue
            run = [node]
            for follows in (self._is_its_batch_norm, self._is_its_activation):
                readers = list(run[-1].users)
                if len(readers) == 1 and follows(run[-1], readers[0]):
                    run.append(readers[0])
            heads[node] = run
            member.update((item, node) for item in run)
        return heads, member

    def _is_its_batch_norm(self, node: fx.Node, reader: fx.Node) -> bool:
        kind, other = self.kinds[node], self.kinds.get(reader)
        joins = kind.weighted and kind.joins_batch_norm(self.calls[node])  # type: ignore[attr-defined]
        return bool(joins and other is not None and other.normalizes and self.calls[reader].operands == [node])

    def _is_its_activation(self, node: fx.Node, reader: fx.Node) -> bool:
        other = self.kinds.get(reader)
        return not self.kinds[node].activation and other is not None and other.activation

    def _choose_accumulators(self) -> dict[fx.Node, fx.Node]:
        """addition -> the operand that stays unquantized: the end of a layer's run, without activation, read once."""
        chosen = {}
        for node, call in self.calls.items():
            if not self.kinds[node].sums:
                continue
            for operand in call.operands:
                head = self.member.get(operand)
                if head is None or not self.kinds[head].weighted or self.heads[head][-1] is not operand:
                    continue
                whole = operand.meta["val"].shape == node.meta["val"].shape
                once = len(operand.users) == 1 and call.operands.count(operand) == 1
                if whole and once and not self.kinds[operand].activation:
                    chosen[node] = operand
                    break
        return chosen

    # --- who reads what -------------------------------------------------------------------------------------------

    def origin(self, node: fx.Node) -> fx.Node:
        """The value behind calls that keep its integers."""
        while node in self.calls and self.keeps_grid(node):
            node = self.calls[node].operands[0]
        return node

    def keeps_grid(self, node: fx.Node) -> bool:
        kind = self.kinds[node]
        return not isinstance(kind, Float) and kind.keeps_grid(self.calls[node])

    def reads(self, node: fx.Node) -> list[Read]:
        """How a call reads each of its operands."""
        kind, call = self.kinds[node], self.calls[node]
        bits = self.bits(node).activations if kind.weighted else self.config.bits.activations
        if kind.moves and not self.keeps_grid(node):  # side by side on one grid, which their steps round to
            return [AS_IT_IS if self._is_alone(item) else STREAM for item in call.operands]
        kept = self.accumulators.get(node)
        return [
            AS_IT_IS if item is kept else read for item, read in zip(call.operands, kind.reads(call, bits), strict=True)
        ]

    def _is_alone(self, node: fx.Node) -> bool:
        """Whether a value is the end of a step that nobody else reads."""
        head = self.member.get(node)
        return head is not None and self.heads[head][-1] is node and len(node.users) == 1

    def _collect(self) -> None:
        for node, call in self.calls.items():
            if self.member.get(node, node) is not node or (self.keeps_grid(node) and self.kinds[node].moves):
                continue
            for operand, read in zip(call.operands, self.reads(node), strict=True):
                self._readings.setdefault(self.origin(operand), []).append(read)
        (output,) = [node for node in self.network.graph.nodes if node.op == "output"]
        for operand in output.all_input_nodes:
            origin = self.origin(operand)
            joined = origin in self.kinds and self.kinds[origin].moves and not isinstance(self.kinds[origin], Float)
            self._readings.setdefault(origin, []).append(ON_A_GRID if joined else AS_IT_IS)

    def _streams(self) -> dict[fx.Node, int]:
        if self.config.activations == "after_relu":
            return {node: self._bits_after_relu(node) for node, kind in self.kinds.items() if kind.rectifies}
        found = {}
        for node, reads in self._readings.items():
            others = {read for read in reads if read != ON_A_GRID}
            agreed = len(others) == 1 and isinstance(next(iter(others)), int)  # then their bits are the grid
            if STREAM in reads or (ON_A_GRID in reads and not agreed):
                found[node] = self.config.residual_bits
        return {node: bits for node, bits in found.items() if self._is_real(node)}

    def _is_real(self, node: fx.Node) -> bool:
        return node.meta["val"].is_floating_point()

    def _bits_after_relu(self, node: fx.Node) -> int:
        """Every reader reads the same quantized value: the bits that the layers among them agree on."""
        wanted = {read for read in self._readings.get(node, []) if isinstance(read, int)}
        return wanted.pop() if len(wanted) == 1 else self.config.bits.activations

    def settled_bits(self, node: fx.Node) -> int | None:
        """Bits of the one quantizer that every reader of a value reads through, if there is one."""
        if node in self.streams or self.config.activations == "after_relu":
            return self.streams.get(node)
        reads = {read for read in self._readings.get(node, []) if read != ON_A_GRID}
        only = reads.pop() if len(reads) == 1 else None
        return only if isinstance(only, int) else None

    def never_negative(self, node: fx.Node) -> bool:
        return node in self._signless

    def _never_negative(self) -> set[fx.Node]:
        """The values that no call can make negative, in the order of the calls."""
        found: set[fx.Node] = set()
        for node, call in self.calls.items():
            kind = self.kinds[node]
            known = [item in found for item in call.operands]
            if not isinstance(kind, Float) and kind.never_negative(call, known):
                found.add(node)
        return found
