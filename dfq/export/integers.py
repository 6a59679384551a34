"""The fake-quantized network as one of integers: every constant that its exact forward uses, computed once.

A node of the quantized network is an `Item`: elements of named integers, or of a step that is still open. Quantizing
rounds the open steps that a value's elements come from, wherever these have been moved to; a step that gathers integers
is made only where somebody reads them in an order in which they do not lie.
"""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from dfq.engine.check import MOST_OUTS, GraphError, check_graph
from dfq.engine.graph import (
    IMAGES,
    Grid,
    IntegerGraph,
    Move,
    Output,
    Quantize,
    Rescale,
    Step,
    as_map,
    inputs,
)
from dfq.export.items import ExportError, Item, Open, check_fixed, grid_of, in_order, joined
from dfq.export.view import View
from dfq.layers import Kind
from dfq.layers.integers import factored
from dfq.layers.kind import Layer as TrainedLayer
from dfq.layers.weighted import QuantLayer
from dfq.network.calls import Call
from dfq.quant import layer_bounds, prepared_of
from dfq.quant.build import KIND
from dfq.quant.quantizers import ActivationQuantizer, WeightQuantizers, weight_layers

INT32 = 2.0**31


@torch.no_grad()
def export(
    model: fx.GraphModule, *, normalization: tuple[tuple[float, ...], tuple[float, ...]] | None = None
) -> IntegerGraph:
    """The integer network of a network that `prepare` made and `freeze_ranges` has fixed.

    Args:
        model: on the CPU; it is put into evaluation mode.
        normalization: mean and deviation per channel of pixels / 255, for a network that is given pixels.

    Raises:
        ExportError: a call that stays in floating point, a value that is not quantized (`activations="after_relu"`), or
            a layer whose sums pass int32.
    """
    check_floats(model)
    graph = replace(Exporter(model.eval()).export(), normalization=normalization)
    try:
        check_graph(graph)
    except GraphError as error:
        raise ExportError(f"export: the model must be an integer network, got one whose {error}") from error
    return graph


def check_floats(model: fx.GraphModule) -> None:
    """Names what has no integer form.

    Raises:
        ExportError: there is some.
    """
    floats = prepared_of(model).floats
    if floats:
        first = "; ".join(f"{module or 'the model'} ({target}: {why})" for module, target, why in floats[:3])
        more = f" and {len(floats) - 3} more" if len(floats) > 3 else ""
        hint = "train it without integers (integers=False, --no-integers) and write it as ONNX (dfq.export_onnx)"
        raise ExportError(
            f"export: every call must have an integer form, got floating-point parts: {first}{more}; {hint}"
        )


class Exporter:
    """Makes the integer network once."""

    def __init__(self, model: fx.GraphModule) -> None:
        self.model, self.input_shape = model, prepared_of(model).input_shape
        check_fixed(model)
        self.weights = {name: (quantizer, weight) for name, quantizer, weight in weight_layers(model)}
        self.bounds = self._check_bounds()
        self.items: dict[fx.Node, Item] = {}
        self.pairs: dict[fx.Node, Item] = {}
        self.order: list[Open] = []
        self.grids: dict[str, Grid] = {}
        self.maps: dict[str, tuple[int, int, int]] = {}
        self.gathered: dict[Any, str] = {}
        self.outputs: list[Output] = []
        self.seen = self._seen()

    def export(self) -> IntegerGraph:
        structure: Any = 0
        for node in self.model.graph.nodes:
            if node.op == "placeholder":
                self.open(node, Quantize(IMAGES, (), None), as_map(self.input_shape), None)
            elif node.op == "output":
                structure = self._nested(node.args[0])
            elif node.op == "call_module":
                self._module(node, self.model.get_submodule(str(node.target)))
            else:
                self._function(node)
        steps = self._alive()
        grids = {name: grid for name, grid in self.grids.items() if any(name in step.outs for step in steps)}
        return IntegerGraph(
            self.input_shape, grids, steps, tuple(self.outputs), self.bounds, structure=structure
        )  # fmt: skip

    def _alive(self) -> tuple[Step, ...]:
        """The steps, without what nothing reads."""
        read = {output.value for output in self.outputs}
        found: list[Step] = []
        for item in reversed(self.order):
            outs = tuple(out for out in item.outs if out in read)
            if outs:
                found.append(replace(item.step, outs=outs))
                read |= set(inputs(item.step))
        return tuple(reversed(found))

    def _check_bounds(self) -> dict[str, float]:
        bounds = {}
        for item in layer_bounds(self.model):
            if item.bound is None:
                raise ExportError(
                    f"export: the input of {item.layer} must be quantized, got a float one (an integer network needs "
                    "activations='all')"
                )
            if item.bound >= INT32:
                raise ExportError(f"export: sums of {item.layer} must stay below 2^31, got up to {item.bound:.0f}")
            bounds[item.layer] = item.bound
        return bounds

    def _seen(self) -> dict[fx.Node, Any]:
        """For one image the shape of every tensor, and every number."""
        seen: dict[fx.Node, Any] = {}

        class Shapes(fx.Interpreter):
            def run_node(self, n: fx.Node) -> Any:
                result = super().run_node(n)
                seen[n] = tuple(result.shape[1:]) if isinstance(result, Tensor) else result
                return result

        Shapes(self.model).run(torch.zeros(1, *self.input_shape))
        return seen

    # --- nodes ----------------------------------------------------------------------------------------------------

    def _module(self, node: fx.Node, module: Any) -> None:
        if isinstance(module, ActivationQuantizer):
            self._pair(node, self.items[node.all_input_nodes[0]], module)
        elif isinstance(module, TrainedLayer):
            module.export(View(self, node, str(node.target), isinstance(module, QuantLayer)))
            item = self.items[node]
            (opened,) = item.bases
            assert isinstance(opened, Open)
            opened.step = replace(opened.step, activation=module.tail.activation)
            if module.tail.quantizer is not None:
                self._pair(node, item, module.tail.quantizer)
        elif not isinstance(module, WeightQuantizers):
            raise ExportError(f"export: {node.target} must have an integer form, got a {type(module).__name__}")

    def _function(self, node: fx.Node) -> None:
        if node.target is operator.getitem:
            if node.args[0] in self.pairs and node.args[1] == 0:
                self.items[node] = self.pairs[node.args[0]]  # type: ignore[index]
            return
        kind = node.meta.get(KIND)
        operands = [item for item in node.all_input_nodes if item in self.items]
        if not operands or not isinstance(kind, Kind):  # weights and sizes
            return
        call = Call(node, {})
        if kind.moves:
            self._move(node, kind, call)
        elif (ends := kind.ends(call)) is not None:
            self.items[node] = replace(self.items[operands[0]], function=ends)
        else:
            kind.export(call, View(self, node, node.name, False))

    def _move(self, node: fx.Node, kind: Kind, call: Call) -> None:
        """The call on index maps."""
        operands = list(dict.fromkeys(item for item in node.all_input_nodes if item in self.items))
        own = kind.fill(call)
        items = [self.items[item] for item in operands]
        fills = {item.fill for item in items if item.padded} | (set() if own is None else {own})
        if len(fills) > 1:  # an item has one: those that are there become maps of their own
            items = [self._filled(item, node.name) if item.padded else item for item in items]
            fills = set() if own is None else {own}
        bases, maps = joined(items, self._sizes(items))
        known = dict(zip(operands, maps, strict=True))
        arguments, keywords = fx.map_arg(
            (node.args, node.kwargs), lambda item: known[item] if item in known else self.seen[item]
        )
        order = kind.place(call, *arguments, **keywords)
        self.items[node] = Item(bases, tuple(order.shape[1:]), order, fills.pop() if fills else 0.0)

    def _filled(self, item: Item, name: str) -> Item:
        """The same values, what fills them among the integers."""
        return Item((self.gather(item, item.places(), as_map(item.shape), f"{name}_filled"),), item.shape)

    def _sizes(self, items: list[Item]) -> dict[Open | str, int]:
        found: dict[Open | str, int] = {}
        for item in items:
            for base in item.bases:
                channels, height, width = base.made if isinstance(base, Open) else self.maps[base]
                found[base] = channels * height * width
        return found

    # --- values ---------------------------------------------------------------------------------------------------

    def open(self, node: fx.Node, step: Step, made: tuple[int, int, int], order: Tensor | None) -> None:
        """Registers a step; its results are added to it when its value is quantized."""
        opened = Open(step, made)
        self.order.append(opened)
        self.items[node] = Item((opened,), self.seen_shape(node), order)

    def seen_shape(self, node: fx.Node) -> tuple[int, ...]:
        shape: Any = self.seen[node]
        return tuple(shape[0].shape[1:]) if shape and isinstance(shape[0], Tensor) else shape  # type: ignore[no-any-return]

    def _pair(self, node: fx.Node, item: Item, quantizer: ActivationQuantizer) -> None:
        """The value of a node that gives `(value, scale)`."""
        grid = grid_of(quantizer)
        alone = len(item.bases) == 1 and item.order is None
        names = [
            self._rounded(base, grid, node.name if alone else f"{node.name}_part{index}")
            for index, base in enumerate(item.bases)
        ]
        made = replace(item, bases=tuple(names), fill=_on_grid(item.fill, grid))
        if not alone:  # two bases may have become one
            bases, (places,) = joined([made], self._sizes([made]))
            made = replace(made, bases=bases, order=places)
        self.pairs[node] = made

    def _rounded(self, base: Open | str, grid: Grid, wanted: str) -> str:
        """A base on a grid."""
        if isinstance(base, str):
            if self.grids[base] == grid:
                return base
            opened = Open(Rescale(base, (), None), self.maps[base])
            self.order.append(opened)
        else:
            opened = base
        for out in opened.outs:
            if self.grids.get(out) == grid:
                return out
        if len(opened.outs) == MOST_OUTS or any(out not in self.grids for out in opened.outs):
            opened = Open(opened.step, opened.made)  # a step makes few results, and integers or real numbers
            self.order.append(opened)
        return self.named(opened, grid, wanted)

    def named(self, opened: Open, grid: Grid, wanted: str) -> str:
        """A new result of a step."""
        while wanted in self.grids or wanted == IMAGES:
            wanted += "_"
        self.grids[wanted], self.maps[wanted] = grid, opened.made
        opened.outs.append(wanted)
        return wanted

    def gather(self, item: Item, order: Tensor, shape: tuple[int, int, int], name: str) -> str:
        """The name of integers that lie in this order; order: `[C, H * W]`."""
        bases = [base for base in item.bases if isinstance(base, str)]
        if len(bases) < len(item.bases):
            raise ExportError(f"export: {name} must be quantized where it is read, got a float value")
        flat = order.reshape(-1).long()
        count = sum(channels * height * width for channels, height, width in (self.maps[base] for base in bases))
        if len(bases) == 1 and self.maps[bases[0]] == shape and torch.equal(flat, torch.arange(count)):
            return bases[0]
        key = (tuple(bases), shape, item.fill, flat.numpy().tobytes())
        if key not in self.gathered:
            grid, sizes = self.grids[bases[0]], [self.maps[base] for base in bases]
            fill = _integer(item.fill, grid)
            step = Move(bases[0], (), None, shape, tuple(bases[1:]), fill=fill,
                        **factored(flat.view(shape[0], -1), shape, sizes))  # fmt: skip
            opened = Open(step, shape)
            self.order.append(opened)
            self.gathered[key] = self.named(opened, grid, name)
        return self.gathered[key]

    # --- outputs --------------------------------------------------------------------------------------------------

    def _nested(self, value: Any) -> Any:
        """How outputs are nested, each as its number."""
        if isinstance(value, fx.Node):
            self._output(value)
            return len(self.outputs) - 1
        if isinstance(value, dict):
            return {str(key): self._nested(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._nested(item) for item in value]
        raise ExportError(f"export: every output must be a tensor, got a {type(value).__name__}")

    def _output(self, node: fx.Node) -> None:
        item = self.items.get(node)
        if item is None:
            raise ExportError(f"export: every output must depend on the images, got {node.name}")
        (base, *others), name = item.bases, f"output{len(self.outputs)}"
        if others or isinstance(base, str):
            places = item.places()
            shape = as_map(item.shape)
            whole = self.gather(item, places, shape, f"{node.name}_whole")
            opened, order = Open(Rescale(whole, (), None), shape), None
            self.order.append(opened)
        else:
            opened, order = base, item.order
            if isinstance(opened.step, Quantize):
                raise ExportError(f"export: an output must be computed, got {node.name}, which is of the images")
            if opened.outs:
                opened = Open(opened.step, opened.made)
                self.order.append(opened)
            if order is not None and bool((order < 0).any()):
                raise ExportError(f"export: an output must not be padded with real numbers, got {node.name}")
        opened.outs.append(name)
        kept = None if order is None or in_order(order) else order.reshape(-1).long()
        function, axis = item.function or (None, 1)
        self.outputs.append(Output(name, item.shape, kept, function, axis))


def _integer(real: float, grid: Grid) -> int:
    """A real number on a grid, rounded as every result is."""
    scaled = torch.tensor(real) * grid.inverse + grid.zero_point
    return int(scaled.round().clamp(grid.quant_min, grid.quant_max))


def _on_grid(real: float, grid: Grid) -> float:
    """What a real number has become after rounding to a grid."""
    return float(torch.tensor(float(_integer(real, grid) - grid.zero_point)) * grid.scale)
