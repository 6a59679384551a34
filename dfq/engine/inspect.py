"""What an integer network is made of, as plain data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dfq.engine.check import check_graph
from dfq.engine.graph import Add, AveragePool, IntegerGraph, Layer, Rescale
from dfq.engine.memory import fuse, plan_memory
from dfq_kernels.packing import stored_bits

EXACT_IN_FP32 = 2.0**24


def facts(graph: IntegerGraph, path: Path) -> dict[str, Any]:
    """Size, memory and layers of a network and its file.

    A layer's `bound` is the largest accumulator that its input's grid allows; `exact_in_fp32`: below 2^24.
    """
    shapes = check_graph(graph)
    _, arena = plan_memory(graph, fuse(graph), shapes)
    layers = [_layer(step, graph, shapes[step.outs[0]]) for step in graph.steps if isinstance(step, Layer)]
    return {
        "bytes": path.stat().st_size, "input_shape": list(graph.input_shape), "num_classes": graph.num_classes,
        "steps": len(graph.steps), "memory_bytes_per_image": arena,
        "multiplications_per_image": sum(layer["multiplications"] for layer in layers), "layers": layers,
        "values": _values(graph, shapes), "normalization": graph.normalization,
    }  # fmt: skip


def _values(graph: IntegerGraph, shapes: dict[str, tuple[int, ...]]) -> list[dict[str, Any]]:
    """Every integer value between the steps. A stream is one that an addition, a batch norm of its own or a pool reads,
    not only layers: it has bits of its own (`QuantConfig.residual_bits`)."""
    streams = {step.x for step in graph.steps if isinstance(step, (Rescale, Add, AveragePool))}
    streams |= {step.other for step in graph.steps if isinstance(step, Add)}
    streams |= {step.residual for step in graph.steps if isinstance(step, Layer) and step.residual is not None}
    return [
        {
            "value": name,
            "bits": grid.bits,
            "signed": grid.signed,
            "shape": list(shapes[name]),
            "stream": name in streams,
        }
        for name, grid in graph.grids.items()
    ]


def _layer(step: Layer, graph: IntegerGraph, shape: tuple[int, ...]) -> dict[str, Any]:
    places = 1
    for side in shape[1:]:
        places *= side
    bound = graph.bounds.get(step.name)
    return {
        "layer": step.name, "weight_shape": list(step.weight.shape), "weight_bits": step.weight_bits,
        "activation_bits": graph.grids[step.x].bits,
        "weight_bytes": -(-step.weight.numel() * stored_bits(step.weight_bits) // 8),
        "multiplications": step.weight.numel() * places, "bound": bound,
        "exact_in_fp32": bound is not None and bound < EXACT_IN_FP32,
    }  # fmt: skip
