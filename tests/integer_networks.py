"""Quantized networks for the tests of the integer engine, and their trained graphs' exact values."""

from __future__ import annotations

import copy
from functools import cache

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from dfq.config import quant_config
from dfq.engine import IntegerGraph
from dfq.engine.operators import OperatorNetwork
from dfq.export import export
from dfq.models import ModelSpec, build_model
from dfq.models.embedded import load_teacher
from dfq.quant import freeze_ranges, prepare, set_adapting
from dfq.quant.quantizers import learn_ranges
from dfq.running.execution import Execution
from tests.conftest import SEED

NETWORKS = ("wrn-16-1", "resnet20", "resnet18", "mobilenet-v2", "vgg11")
PRESETS = ("W8A8", "W4A8", "W4A4", "W2A2")


def input_shape(name: str) -> tuple[int, int, int]:
    return (1, 32, 32) if name == "wrn-16-1" else (3, 32, 32)


@cache
def float_network(name: str) -> nn.Module:
    """The embedded teacher, or random weights whose batch norms have seen noise."""
    if name == "wrn-16-1":
        return load_teacher()
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(SEED)
        model = build_model(ModelSpec(name, 3, 10)).train()
        with torch.no_grad():
            for _ in range(2):
                model(torch.randn(16, 3, 32, 32))
    return model.eval()


def quantized(model: nn.Module, shape: tuple[int, int, int], preset: str, ranges: str = "minmax") -> fx.GraphModule:
    """`model` with ranges that have seen noise, as it is evaluated."""
    config = quant_config(preset, ranges=ranges)
    prepared = prepare(copy.deepcopy(model), shape, config).train()
    set_adapting(prepared, True, batch_norms=False)
    with torch.no_grad(), torch.random.fork_rng(devices=()):
        torch.manual_seed(SEED + 1)
        for _ in range(2):
            prepared(torch.randn(8, *shape))
    set_adapting(prepared, False)
    learn_ranges(prepared, config)
    freeze_ranges(prepared)
    return prepared.eval()


class _Recorder(fx.Interpreter):
    def __init__(self, model: fx.GraphModule) -> None:
        super().__init__(model)
        self.seen: dict[str, object] = {}

    def run_node(self, n: fx.Node) -> object:
        self.seen[n.name] = result = super().run_node(n)
        return result


@torch.no_grad()
def exact_values(model: fx.GraphModule, graph: IntegerGraph, images: Tensor) -> dict[str, Tensor]:
    """Every integer that the trained graph's exact forward goes through, by the integer graph's names, and logits.

    Values that only the integer graph has (integers that were gathered, or rounded where they are put side by side) are
    left out.
    """
    recorder = _Recorder(model)
    values = dict(zip([output.value for output in graph.outputs], tree_leaves(recorder.run(images)), strict=True))
    for name, grid in graph.grids.items():
        found = recorder.seen.get(name)
        value = found[0] if isinstance(found, tuple) else found
        if isinstance(value, Tensor):
            values[name] = (value / grid.scale).round().long() + grid.zero_point
    return values


def reference_values(graph: IntegerGraph, images: Tensor) -> dict[str, Tensor]:
    """Every value by the operators' references."""
    return OperatorNetwork(graph, torch.device("cpu"), "reference", Execution("off", torch.device("cpu"))).values(
        images
    )


def exported(name: str, preset: str) -> tuple[fx.GraphModule, IntegerGraph]:
    model = quantized(float_network(name), input_shape(name), preset, "lsq" if preset == "W4A4" else "minmax")
    return model, export(model)


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """The values that differ."""
    return [name for name, value in found.items() if not torch.equal(value.flatten(), expected[name].flatten())]
