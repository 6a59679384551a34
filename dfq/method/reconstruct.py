"""Layer by layer, a quantized network learns its float self's values on a few images.

for each layer, in the order of the graph:
    x      what the layers before it, quantized, make of the images
    y      the layer's float value, of float layers before it
    minimise  |layer(x) - y|^2 / |y|^2  over its weights, its batch norm and its step sizes

Sources: I. Hubara et al., Accurate Post Training Quantization With Small Calibration Sets, ICML 2021 (weights and step
sizes of one layer); M. Nagel et al., Up or Down?, ICML 2020 (the quantized input, the float target).
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from dfq.config import LayerFit
from dfq.layers.weighted import QuantLayer
from dfq.quant.modes import bypassed, float_layer
from dfq.quant.quantizers import WeightQuantizers, range_parameters, weight_layers
from dfq.running import ranks
from dfq.running.optimizers import adam, cosine, set_learning_rate
from dfq.running.seeds import random_source

Values = dict[fx.Node, Any]
MEMORY = 2**32  # bytes that all images' values may take
COPIES = 4  # of what one walk holds: two walks, and one layer's inputs and outputs of both
LEAST = 32  # images


class Walk:
    """A network's values on some images, node after node; what no later node reads is let go.

    Weights are not among them: a layer's are made when the layer runs, as they are then.
    """

    def __init__(self, network: fx.GraphModule, batches: Sequence[Tensor]) -> None:
        self.network, self.batches, self.values = network, batches, [Values() for _ in batches]
        self.nodes = list(network.graph.nodes)
        self.interpreter = fx.Interpreter(network)
        self.quantizers = {name: quantizer for name, quantizer, _ in weight_layers(network)}
        self.last = {source: node for node in self.nodes for source in node.all_input_nodes}
        self.layers = [place for place, node in enumerate(self.nodes) if isinstance(self.module(node), QuantLayer)]

    def module(self, node: fx.Node) -> nn.Module | None:
        return self.network.get_submodule(str(node.target)) if node.op == "call_module" else None

    @torch.no_grad()
    def run(self, place: int) -> None:
        """Node `place` on all images."""
        node = self.nodes[place]
        for values, images in zip(self.values, self.batches, strict=True):
            if node.op != "output":
                values[node] = images if node.op == "placeholder" else self._value(node, values)
            for source in node.all_input_nodes:
                if self.last[source] is node:
                    del values[source]

    def inputs(self, place: int) -> tuple[Tensor, Tensor | None]:
        """Of a layer: all images' values, and their scale."""
        x, scale, *_ = self.nodes[place].args
        parts = [fx.node.map_arg((x, scale), values.__getitem__) for values in self.values]
        return torch.cat([part for part, _ in parts]), parts[0][1]

    def outputs(self, place: int) -> Tensor:
        """A layer's, of all images."""
        made = [values[self.nodes[place]] for values in self.values]
        return torch.cat([value[0] if isinstance(value, tuple) else value for value in made])

    def _value(self, node: fx.Node, values: Values) -> Any:
        module = self.module(node)
        if isinstance(module, WeightQuantizers) or (node.target is operator.getitem and values[node.args[0]] is None):  # type: ignore[index]
            return None
        if isinstance(module, QuantLayer):
            x, x_scale = fx.node.map_arg(node.args[:2], values.__getitem__)  # type: ignore[misc]
            return self.layer(node, x, x_scale)  # type: ignore[arg-type]
        self.interpreter.env = values
        return self.interpreter.run_node(node)

    def layer(self, node: fx.Node, x: Tensor, x_scale: Tensor | None) -> Any:
        """A layer's result."""
        module = self.network.get_submodule(str(node.target))
        return module(x, x_scale, *self.quantizers[str(node.target)](module.oriented()))  # type: ignore[operator]


def images_in_memory(network: fx.GraphModule, image: Tensor) -> int:
    """How many images the walks may hold, from what one image `[1, ...]` takes at most."""
    walk, most = Walk(network, [image]), 1
    for place in range(len(walk.nodes)):
        walk.run(place)
        held = [item for value in walk.values[0].values() for item in (value if isinstance(value, tuple) else (value,))]
        most = max(most, sum(item.numel() * item.element_size() for item in held if isinstance(item, Tensor)))
    return max(MEMORY // (COPIES * most), LEAST)


class FloatWalk(Walk):
    """The same network in floating point: as trained, nothing rounded."""

    def run(self, place: int) -> None:
        with bypassed(self.network):
            super().run(place)

    def layer(self, node: fx.Node, x: Tensor, x_scale: Tensor | None) -> Any:
        return float_layer(self.network.get_submodule(str(node.target)), x)


class Reconstruction:
    """Fits one layer a step, and walks on.

    Args:
        student: of `dfq.quant.prepare`, with ranges set; step sizes that are to be learned are parameters
            (`learn_ranges`). It is changed in place.
        exact: the same network as it was prepared, with the trained network's weights.
        batches: images, each batch as large as the memory has room for.
        fit: how a layer learns.
        seed: of the images that a step draws.
    """

    def __init__(
        self, student: fx.GraphModule, exact: fx.GraphModule, batches: Sequence[Tensor], fit: LayerFit, seed: int
    ) -> None:
        self.coarse, self.exact = Walk(student, batches), FloatWalk(exact, batches)
        self.fit, self.seed, self.place = fit, seed, 0
        self.fitted: set[int] = set()  # a weight that layers share is fitted to the first of them

    @property
    def steps(self) -> int:
        """One for each layer with weights."""
        return len(self.coarse.layers)

    def step(self, index: int) -> Mapping[str, Tensor]:
        """Fits layer `index`; those before it are as they are, fitted by earlier steps or read from a checkpoint."""
        place, walks = self.coarse.layers[index], (self.exact, self.coarse)
        for walk in walks:
            walk.network.train()
        while self.place < place:
            self._run()
        self.exact.run(place)
        metrics = self._fit(place)
        self.coarse.run(place)
        self.place += 1
        return metrics

    def _run(self) -> None:
        for walk in (self.exact, self.coarse):
            walk.run(self.place)
        node = self.coarse.nodes[self.place]
        if self.place in self.coarse.layers:
            self.fitted |= {id(parameter) for parameter in self._parameters(node)[0]}
        self.place += 1

    def _parameters(self, node: fx.Node) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """A layer's own, and its step sizes: of its weights and of its result."""
        name = str(node.target)
        module, quantizer = self.coarse.network.get_submodule(name), self.coarse.quantizers[name]
        ranges = range_parameters(module) + range_parameters(quantizer)
        learned = {id(parameter) for parameter in ranges}
        own = [parameter for parameter in module.parameters() if id(parameter) not in learned | self.fitted]
        return own, ranges

    def _fit(self, place: int) -> Mapping[str, Tensor]:
        node, fit = self.coarse.nodes[place], self.fit
        (x, x_scale), wanted = self.coarse.inputs(place), self.exact.outputs(place)
        x_scale = None if x_scale is None else x_scale.detach()
        own, ranges = self._parameters(node)
        self.fitted |= {id(parameter) for parameter in own}
        power = wanted.square().mean().clamp(min=torch.finfo(torch.float32).tiny)
        rates = ((own, fit.learning_rate), (ranges, fit.range_learning_rate))
        optimizers = [adam(parameters, rate) for parameters, rate in rates if parameters]
        first = loss = torch.zeros(())
        for step in range(fit.steps):
            random = random_source(self.seed, "reconstruct", place, step)
            drawn = ranks.share(torch.randint(len(x), (fit.batch_size,), generator=random).to(x.device))
            made = self.coarse.layer(node, x[drawn], x_scale)
            made = made[0] if isinstance(made, tuple) else made
            loss = (made - wanted[drawn]).square().mean() / power
            for optimizer in optimizers:
                set_learning_rate(optimizer, cosine(step, fit.steps))
                optimizer.zero_grad(set_to_none=True)
            loss.backward()
            ranks.average_gradients(own + ranges)
            for optimizer in optimizers:
                optimizer.step()
            first = loss.detach() if step == 0 else first
        return {"layer/before": first, "layer/after": loss.detach()}
