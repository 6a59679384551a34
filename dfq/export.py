"""The fake-quantized graph as an integer network: every constant that its exact forward uses, computed once.

A node of the trained graph is a quantized value, or a step that is still open: its activation, a residual, max pools
and its results may follow. Whoever changes an open step that others read too goes on with a copy of it.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from dfq.engine.check import GraphError, check_graph
from dfq.engine.graph import (
    IMAGES,
    Add,
    AveragePool,
    Grid,
    IntegerGraph,
    Layer,
    MaxPool,
    Quantize,
    Rescale,
    Step,
    inputs,
)
from dfq.quant.exactness import layer_bounds
from dfq.quant.modules import QuantBatchNorm, QuantConv2d, QuantLayer, QuantLinear, per_channel
from dfq.quant.pooling import QuantAveragePool
from dfq.quant.quantizers import ActivationQuantizer, WeightQuantizers, weight_layers
from dfq_kernels.bn_act_stats.reference import multiplier

INT32 = 2.0**31
MOVES = (torch.flatten, torch.reshape, "flatten", "reshape", "view", "contiguous")
LOGITS = "logits"


class ExportError(ValueError):
    """A trained graph that is no integer network."""


@dataclass
class _Open:
    """A step under construction, and what its value goes through before it is quantized: max pools."""

    step: Step
    outs: list[str] = field(default_factory=list)
    pools: tuple[fx.Node, ...] = ()


_Item = str | _Open  # a quantized value's name, or a step's raw result


@torch.no_grad()
def export(
    model: fx.GraphModule,
    input_shape: tuple[int, int, int],
    num_classes: int,
    *,
    normalization: tuple[tuple[float, ...], tuple[float, ...]] | None = None,
) -> IntegerGraph:
    """The integer network of a graph that `prepare` made and `freeze_ranges` has fixed.

    Args:
        model: in evaluation mode, on the CPU.
        input_shape, num_classes: of its images and logits.
        normalization: mean and deviation per channel of pixels / 255, for a network that is given pixels.

    Raises:
        ExportError: a value that stays float (`activations="after_relu"`), a layer whose sums pass int32, or a move of
            values that an integer network has no step for.
    """
    graph = replace(_Exporter(model.eval(), input_shape, num_classes).export(), normalization=normalization)
    try:
        check_graph(graph)
    except GraphError as error:
        raise ExportError(f"export: the model must be an integer network, got one whose {error}") from error
    return graph


class _Exporter:
    def __init__(self, model: fx.GraphModule, input_shape: tuple[int, int, int], num_classes: int) -> None:
        self.model, self.input_shape, self.num_classes = model, input_shape, num_classes
        for name, module in model.named_modules():
            if isinstance(module, ActivationQuantizer) and not module.seen:
                raise ExportError(f"export: the model must have fixed ranges (freeze_ranges), got {name} without one")
        self.weights = {name: (quantizer, weight) for name, quantizer, weight in weight_layers(model)}
        self.bounds = self._check_bounds()
        self.items: dict[fx.Node, _Item] = {}
        self.pairs: dict[fx.Node, str] = {}
        self.order: list[_Open] = []
        self.grids: dict[str, Grid] = {}
        self.shapes = self._shapes()

    def export(self) -> IntegerGraph:
        output = None
        for node in self.model.graph.nodes:
            if node.op == "placeholder":
                self._open(node, Quantize(IMAGES, (), None))
            elif node.op == "output":
                output = self._logits(node.all_input_nodes[0])
            elif node.op == "call_module":
                self._module(node, self.model.get_submodule(str(node.target)))
            else:
                self._function(node)
        assert output is not None
        steps = tuple(replace(item.step, outs=tuple(item.outs)) for item in self.order if item.outs)
        read = {name for step in steps for name in inputs(step)} | {output}
        if unread := [name for step in steps for name in step.outs if name not in read]:
            raise ExportError(f"export: every value must be read, got {unread[0]} that nothing reads")
        return IntegerGraph(self.input_shape, self.num_classes, self.grids, steps, output, self.bounds)

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

    def _shapes(self) -> dict[fx.Node, torch.Size]:
        """The shape of every tensor, for one image."""
        shapes: dict[fx.Node, torch.Size] = {}

        class Shapes(fx.Interpreter):
            def run_node(self, n: fx.Node) -> Any:
                result = super().run_node(n)
                if isinstance(result, Tensor):
                    shapes[n] = result.shape
                return result

        Shapes(self.model).run(torch.zeros(1, *self.input_shape))
        return shapes

    # --- nodes ----------------------------------------------------------------------------------------------------

    def _module(self, node: fx.Node, module: nn.Module) -> None:
        source = node.all_input_nodes[0] if node.all_input_nodes else None
        if isinstance(module, ActivationQuantizer):
            assert source is not None
            self._quantized(node, self.items[source], module)
        elif isinstance(module, QuantLayer):
            self._open(node, self._layer(node, module))
            self._tail(node, module.tail.activation, module.tail.quantizer)
        elif isinstance(module, QuantBatchNorm):
            assert source is not None
            self._open(node, self._batch_norm(self._value(source), module))
            self._tail(node, module.activation, module.quantizer)
        elif isinstance(module, QuantAveragePool):
            assert source is not None
            self._open(node, _average_pool(self._value(source), module))
        elif isinstance(module, nn.MaxPool2d):
            self._max_pool(node, self.items[node.all_input_nodes[0]])
        elif isinstance(module, (nn.Flatten, nn.Identity)):
            self._move(node)
        elif not isinstance(module, WeightQuantizers):
            raise ExportError(f"export: {node.target} must have an integer form, got a {type(module).__name__}")

    def _function(self, node: fx.Node) -> None:
        if node.target is operator.getitem:
            source = node.args[0]
            if source in self.pairs and node.args[1] == 0:
                self.items[node] = self.pairs[source]  # type: ignore[index]
        elif node.target is operator.add:
            self._add(node)
        elif node.target in (F.relu, F.relu6):
            self._activation(node, "relu" if node.target is F.relu else "relu6")
        elif node.target is F.max_pool2d:
            self._max_pool(node, self.items[node.all_input_nodes[0]])
        elif node.target in MOVES:
            self._move(node)
        elif node.op != "get_attr" and node in self.shapes:
            raise ExportError(f"export: {node.name} must have an integer form, got a call of {node.target}")

    def _layer(self, node: fx.Node, module: QuantLayer) -> Layer:
        name = str(node.target)
        x = self._value(node.all_input_nodes[0])
        quantizer, weight = self.weights[name]
        if float(quantizer.zero_point.abs().max()) != 0:
            raise ExportError(f"export: weights of {name} must be symmetric, got zero points (weight_scheme='affine')")
        mult, bias = module.tail.constants(module.bias, quantizer.scale)
        out, scale = quantizer(weight)
        integers = torch.round(out / per_channel(scale, out, 0)).to(torch.int8)
        common = {
            "x": x, "outs": (), "activation": None, "name": name, "weight": integers, "weight_bits": quantizer.bits,
            "mult": torch.tensor(self.grids[x].scale) * mult, "bias": bias.clone(), "residual": None,
        }  # fmt: skip
        if isinstance(module, QuantLinear):
            if len(self.shapes[node.all_input_nodes[0]]) != 2:
                raise ExportError(f"export: {name} must see [N, features], got another shape")
            return Layer(**common)  # type: ignore[arg-type]
        assert isinstance(module, QuantConv2d)
        geometry = {"stride": module.stride, "padding": _padding(name, module), "dilation": module.dilation}
        return Layer(**common, **geometry, groups=module.groups)  # type: ignore[arg-type]

    def _batch_norm(self, x: str, module: QuantBatchNorm) -> Rescale:
        assert module.bn is not None
        mean, var = module._stored()
        mult = multiplier(module.bn.weight, var, module.bn.eps)
        bias = torch.zeros_like(mean) if module.bn.bias is None else module.bn.bias
        return Rescale(x, (), None, mean.clone(), mult.clone(), bias.clone())

    def _add(self, node: fx.Node) -> None:
        first, second = (self.items[item] for item in node.all_input_nodes)
        if isinstance(first, str) and isinstance(second, str):
            self._open(node, Add(first, (), None, second))
            return
        source, other = node.all_input_nodes if isinstance(first, _Open) else reversed(node.all_input_nodes)
        residual, opened = self.items[other], self._taken(source)
        alone = isinstance(opened.step, Layer) and not (opened.pools or opened.step.activation or opened.step.residual)
        if not alone or not isinstance(residual, str):
            raise ExportError(f"export: one side of {node.name} must be quantized, the other one a layer's sums")
        opened.step = replace(opened.step, residual=residual)  # type: ignore[call-arg]
        self.order.remove(opened)
        self.order.append(opened)  # its residual is there by now
        self.items[node] = opened

    def _activation(self, node: fx.Node, activation: str) -> None:
        source = node.all_input_nodes[0]
        item = self.items[source]
        if isinstance(item, str):
            self._open(node, Rescale(item, (), activation))
            return
        opened = self._taken(source)
        if opened.step.activation:
            raise ExportError(f"export: {node.name} must not follow another activation, got {opened.step.activation}")
        opened.step = replace(
            opened.step, activation=activation
        )  # behind a max pool too: the largest stays the largest
        self.items[node] = opened

    def _taken(self, source: fx.Node) -> _Open:
        """The open step that made `source`, for a reader that changes it."""
        item = self.items[source]
        assert isinstance(item, _Open)
        if len(source.users) > 1:
            item = _Open(item.step, [], item.pools)
            self.order.append(item)
        return item

    def _move(self, node: fx.Node) -> None:
        """A flattening in front of a linear layer, which flattens by itself; or no move at all."""
        source = node.all_input_nodes[0]
        before, after = self.shapes[source], self.shapes[node]
        if after not in (before, torch.Size((1, before.numel()))):
            raise ExportError(f"export: {node.name} must keep or flatten a shape, got {tuple(before)}, {tuple(after)}")
        self.items[node] = self.items[source]

    def _max_pool(self, node: fx.Node, item: _Item) -> None:
        if isinstance(item, _Open):
            opened = self._taken(node.all_input_nodes[0])
            opened.pools = (*opened.pools, node)
            self.items[node] = opened
            return
        self.items[node] = self._pooled(item, node)

    # --- values ---------------------------------------------------------------------------------------------------

    def _open(self, node: fx.Node, step: Step) -> None:
        opened = _Open(step)
        self.order.append(opened)
        self.items[node] = opened

    def _tail(self, node: fx.Node, activation: str | None, quantizer: ActivationQuantizer | None) -> None:
        item = self.items[node]
        assert isinstance(item, _Open)
        item.step = replace(item.step, activation=activation)
        if quantizer is not None:
            self._quantized(node, item, quantizer)

    def _quantized(self, node: fx.Node, item: _Item, quantizer: ActivationQuantizer) -> None:
        """Makes the value of a node that gives `(value, scale)`."""
        name = self._name(node.name)
        self.grids[name] = Grid(
            float(quantizer.scale), int(quantizer.zero_point), quantizer.quant_min, quantizer.quant_max
        )
        if isinstance(item, str):
            item = _Open(Rescale(item, (), None))
            self.order.append(item)
        item.outs.append(name)
        for pool in item.pools:  # rounding commutes with the largest
            name = self._pooled(name, pool, f"{node.name}_{pool.name}")
        self.pairs[node] = name

    def _name(self, wanted: str) -> str:
        """A name that no other value has."""
        while wanted in self.grids or wanted in (IMAGES, LOGITS):
            wanted += "_"
        return wanted

    def _pooled(self, x: str, node: fx.Node, name: str | None = None) -> str:
        name = self._name(name or node.name)
        window = _window(node, self.model)
        self.grids[name] = self.grids[x]
        self.order.append(_Open(MaxPool(x, (), None, **window), [name]))
        return name

    def _value(self, node: fx.Node) -> str:
        item = self.items[node]
        if isinstance(item, _Open):
            raise ExportError(f"export: {node.name} must be quantized where it is read, got a float value")
        return item

    def _logits(self, node: fx.Node) -> str:
        if isinstance(self.items[node], str):
            raise ExportError("export: the logits must come from a layer or an average pool")
        opened = self._taken(node)
        if opened.outs:  # a step makes integers or logits
            opened = _Open(opened.step, [], opened.pools)
            self.order.append(opened)
        if opened.pools or not isinstance(opened.step, (Layer, AveragePool)):
            raise ExportError("export: the logits must come from a layer or an average pool")
        opened.outs.append(LOGITS)
        return LOGITS


def _padding(name: str, module: QuantConv2d) -> tuple[int, ...]:
    """In numbers, where it is `valid` or `same`."""
    if not isinstance(module.padding, str):
        return tuple(module.padding)
    spans = [d * (k - 1) for d, k in zip(module.dilation, module.weight.shape[2:], strict=True)]
    if module.padding == "same" and any(span % 2 for span in spans):
        raise ExportError(f"export: padding of {name} must be as much before as behind, got 'same' with an even kernel")
    return tuple(span // 2 if module.padding == "same" else 0 for span in spans)


def _average_pool(x: str, module: QuantAveragePool) -> AveragePool:
    if module.kernel_size is not None:
        return AveragePool(x, (), None, module.kernel_size, module.stride, module.padding)
    if None in module.output_size:
        raise ExportError("export: an adaptive pool must have both output sizes, got None")
    return AveragePool(x, (), None, output=module.output_size)


def _window(node: fx.Node, model: fx.GraphModule) -> dict[str, Any]:
    names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
    if node.op == "call_module":
        module = model.get_submodule(str(node.target))
        values = {name: getattr(module, name) for name in names}
    else:
        values = {**dict(zip(names, node.args[1:], strict=False)), **node.kwargs}
    stride = values.get("stride")
    return {
        "kernel": _pair(values["kernel_size"]),
        "stride": _pair(values["kernel_size"] if stride in (None, (), []) else stride),
        "padding": _pair(values.get("padding", 0)), "dilation": _pair(values.get("dilation", 1)),
        "ceil_mode": bool(values.get("ceil_mode", False)),
    }  # fmt: skip


def _pair(value: Any) -> tuple[int, int]:
    first, second = value if isinstance(value, (list, tuple)) else (value, value)
    return int(first), int(second)
