"""How a fake-quantized network runs for a while: in floating point, with its batches' own statistics, at other bits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from dfq.layers.tail import Tail
from dfq.quant.quantizers import ActivationQuantizer, set_adapting, weight_layers


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
def batch_statistics(student: nn.Module) -> Iterator[None]:
    """Batch norms normalise by the batch's statistics, ranges follow. Afterwards the batch norms are what they were."""
    tails = normalized_tails(student)
    kept = [
        (tail, tail.train_batch_norm, [(buffer, buffer.clone()) for buffer in tail.bn.buffers()])  # type: ignore[union-attr]
        for tail in tails
    ]
    mode = student.training
    student.train()
    set_adapting(student, True)
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
def weights_of(student: nn.Module, bits: Mapping[str, int]) -> Iterator[None]:
    """Layers have weights of other bits for a while, with the scales of least squared error."""
    chosen = [(layer, weight.detach(), bits[name]) for name, layer, weight in weight_layers(student) if name in bits]
    kept = [(layer.bits, {key: value.clone() for key, value in layer.state_dict().items()}) for layer, _, _ in chosen]
    for layer, weight, wanted in chosen:
        layer.use_bits(wanted)
        layer.fit(weight)
    try:
        yield
    finally:
        for (layer, _, _), (before, state) in zip(chosen, kept, strict=True):
            layer.use_bits(before)
            layer.load_state_dict(state)
