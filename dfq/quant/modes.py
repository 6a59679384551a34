"""How a fake-quantized network runs for a while: in floating point, with its batches' own statistics."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from dfq.layers.kind import Layer
from dfq.layers.tail import Tail
from dfq.layers.weighted import QuantLayer
from dfq.quant.quantizers import ActivationQuantizer, WeightQuantizers, set_adapting


@contextmanager
def bypassed(student: nn.Module) -> Iterator[None]:
    """Activations pass their quantizers as they are."""
    quantizers = [module for module in student.modules() if isinstance(module, ActivationQuantizer)]
    for quantizer in quantizers:
        quantizer.bypassed = True
    try:
        yield
    finally:
        for quantizer in quantizers:
            quantizer.bypassed = False


def normalized_tails(student: nn.Module) -> list[Tail]:
    """The ends of layers that have a batch norm."""
    return [module for module in student.modules() if isinstance(module, Tail) and module.bn is not None]


@contextmanager
def batch_statistics(student: nn.Module, *, ranges: bool = True) -> Iterator[None]:
    """Batch norms normalise by the batch's statistics, ranges follow or stay. Afterwards batch norms are as before."""
    tails = normalized_tails(student)
    kept = [
        (tail, tail.train_batch_norm, [(buffer, buffer.clone()) for buffer in tail.bn.buffers()])  # type: ignore[union-attr]
        for tail in tails
    ]
    mode = student.training
    student.train()
    set_adapting(student, True)
    for module in student.modules() if not ranges else ():
        if isinstance(module, ActivationQuantizer):
            module.adapting = False
    for tail in tails:
        tail.train_batch_norm = True
    try:
        yield
    finally:
        set_adapting(student, False)
        student.train(mode)
        with torch.no_grad():
            for tail, trains, buffers in kept:
                tail.train_batch_norm = trains
                for buffer, value in buffers:
                    buffer.copy_(value)


@contextmanager
def averages_as_wide_as_their_inputs(student: nn.Module) -> Iterator[None]:
    """Afterwards an average has the range of what it is an average of, as seen meanwhile.

    Noise has no parts that are large over a whole image: it averages out where the features of real images do not.
    """
    averages = [module for module in student.modules() if isinstance(module, Layer) and module.averages]
    quantized = [module for module in averages if isinstance(module.tail.quantizer, ActivationQuantizer)]
    seen: dict[nn.Module, list[Tensor]] = {module: [] for module in quantized}

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen[module].append(torch.stack(torch.aminmax(inputs[0].detach().float())))

    hooks = [module.register_forward_pre_hook(note) for module in quantized]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for module, ends in seen.items():
            if ends:
                all_ends = torch.stack(ends)
                module.tail.quantizer.set_range(all_ends[:, 0].min(), all_ends[:, 1].max())  # type: ignore[union-attr, operator]


def float_layer(layer: Any, x: Tensor, weight: Tensor | None = None) -> Any:
    """A layer's result in floating point, with its own weight or another; its input comes from bypassed quantizers."""
    return layer.tail(layer.accumulate(x, layer.oriented() if weight is None else weight, layer.bias))


class FloatRun(fx.Interpreter):
    """A student in floating point: as trained, nothing rounded, but for layers that are given other weights.

    Args:
        student: of `dfq.quant.prepare`.
        weights: by the name of the layer, output channels first.
    """

    def __init__(self, student: fx.GraphModule, weights: Mapping[str, Tensor] | None = None) -> None:
        super().__init__(student)
        self.student, self.weights = student, weights or {}

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Any:
        with bypassed(self.student):
            return self.run(images)

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        module = self.fetch_attr(target)
        if isinstance(module, QuantLayer):
            return float_layer(module, args[0], self.weights.get(target))
        return None if isinstance(module, WeightQuantizers) else super().call_module(target, args, kwargs)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        nothing = target is operator.getitem and args[0] is None  # of the weights, which no quantizer made
        return None if nothing else super().call_function(target, args, kwargs)
