"""What an integer network is made of, as plain data."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from dfq.engine.check import Shape, check_graph
from dfq.engine.graph import (
    Add,
    AveragePool,
    IntegerGraph,
    Layer,
    Multiply,
    Output,
    Rescale,
    Resize,
    Step,
    inputs,
)
from dfq.engine.memory import fuse, plan_memory
from dfq_kernels.packing import stored_bits

EXACT_IN_FP32 = 2.0**24


def facts(graph: IntegerGraph, path: Path | None = None) -> dict[str, Any]:
    """Size, memory, values, steps and layers of a network and its file.

    A layer's `bound` is the largest accumulator that its input's grid allows; `exact_in_fp32`: below 2^24. `sequence`:
    the steps in order, each with its share of the multiplications, which are those of the layers, and the bits of what
    it reads; `floats`: what is in floating point, which is nothing (`dfq.quant.inspect` has the same of a student).
    """
    shapes = check_graph(graph)
    _, arena = plan_memory(graph, fuse(graph, shapes), shapes)
    layers = [_layer(step, graph, shapes[step.outs[0]]) for step in graph.steps if isinstance(step, Layer)]
    kinds = sorted({step.kind for step in graph.steps})
    total = sum(layer["multiplications"] for layer in layers)
    return {
        "bytes": None if path is None else path.stat().st_size, "input_shape": list(graph.input_shape),
        "num_classes": graph.num_classes,
        "steps": len(graph.steps), "memory_bytes_per_image": arena,
        "multiplications_per_image": total, "layers": layers, "sequence": _sequence(graph, shapes, total),
        "kinds": {kind: sum(step.kind == kind for step in graph.steps) for kind in kinds},
        "values": _values(graph, shapes), "outputs": [_output(output) for output in graph.outputs],
        "normalization": graph.normalization, "floats": [], "integer_share": 1.0,
    }  # fmt: skip


def _values(graph: IntegerGraph, shapes: dict[str, Shape]) -> list[dict[str, Any]]:
    """Every integer value between the steps. A stream is one that an addition, a product, a batch norm of its own, a
    pool or a resize reads, not only layers: it has bits of its own (`QuantConfig.residual_bits`)."""
    streams = {step.x for step in graph.steps if isinstance(step, (Rescale, Add, Multiply, AveragePool, Resize))}
    streams |= {step.other for step in graph.steps if isinstance(step, (Add, Multiply))}
    streams |= {step.residual for step in graph.steps if isinstance(step, Layer) and step.residual is not None}
    makers: dict[str, Step] = {out: step for step in graph.steps for out in step.outs}
    return [
        {
            "value": name, "bits": grid.bits, "signed": grid.signed, "scale": grid.scale,
            "zero_point": grid.zero_point, "quant_min": grid.quant_min, "quant_max": grid.quant_max,
            "shape": list(shapes[name]), "made_by": makers[name].kind, "stream": name in streams,
        }
        for name, grid in graph.grids.items() if name in makers
    ]  # fmt: skip


def _sequence(graph: IntegerGraph, shapes: dict[str, Shape], total: int) -> list[dict[str, Any]]:
    """A row for every step."""
    rows = []
    for step in graph.steps:
        shape = shapes[step.outs[0]]
        layer = _layer(step, graph, shape) if isinstance(step, Layer) else None
        own = layer or {"layer": step.outs[0], "weight_bits": None, "multiplications": 0}
        rows.append(
            {
                "kind": step.kind, "name": own["layer"], "integer": True, "activation": step.activation,
                "weight_bits": own["weight_bits"], "shape": list(shape),
                "activation_bits": graph.grids[step.x].bits if step.x in graph.grids else None,
                "multiplications": own["multiplications"], "share": own["multiplications"] / total if total else 0.0,
                "reads": inputs(step), "makes": list(step.outs),
            }
        )  # fmt: skip
    return rows


def _output(output: Output) -> dict[str, Any]:
    return {"value": output.value, "shape": list(output.shape), "function": output.function}


def _layer(step: Layer, graph: IntegerGraph, shape: Shape) -> dict[str, Any]:
    bound = graph.bounds.get(step.name)
    return {
        "layer": step.name, "weight_shape": list(step.weight.shape), "weight_bits": step.weight_bits,
        "activation_bits": graph.grids[step.x].bits,
        "weight_bytes": -(-step.weight.numel() * stored_bits(step.weight_bits) // 8),
        "multiplications": step.weight.numel() * math.prod(shape[1:]), "bound": bound,
        "exact_in_fp32": bound is not None and bound < EXACT_IN_FP32,
    }  # fmt: skip
