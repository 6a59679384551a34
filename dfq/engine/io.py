"""Integer networks in files: safetensors, the graph as JSON in its metadata, weights packed, constants as they are.

    metadata: {"dfq_integer_graph": JSON, with its "version"}; one entry, so that a network is always the same bytes
    tensors:  "grids.scale" fp32 [n]; "grids" int16 [n, 3]: zero_point, quant_min, quant_max, in the order of the names
              "<step>.<field>" of every step's tensors; weights packed by `dfq_kernels.pack_bits` in 8, 4 or 2 bits
              "outputs.<output>.order" int64, of the outputs that have one

A reader computes no constant, and checks everything before it uses anything (`check_graph`).
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dfq.engine.check import check_graph
from dfq.engine.graph import STEPS, Grid, IntegerGraph, Layer, Output, Step
from dfq.engine.rules import GraphError
from dfq.errors import first_line
from dfq.running.checkpoint import CheckpointError, write_atomic
from dfq_kernels.packing import pack_bits, stored_bits, unpack_bits

# what reading bytes raises that are not those of a network
_DAMAGED = (SafetensorError, GraphError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError,
            RecursionError)  # fmt: skip
KEY, VERSION = "dfq_integer_graph", 2


def save_graph(graph: IntegerGraph, path: Path) -> None:
    """Writes the network, whole or not at all.

    Raises:
        CheckpointError: the file cannot be written.
    """
    tensors = {
        "grids.scale": torch.tensor([grid.scale for grid in graph.grids.values()], dtype=torch.float32),
        "grids": torch.tensor(
            [[grid.zero_point, grid.quant_min, grid.quant_max] for grid in graph.grids.values()], dtype=torch.int16
        ),
    }
    steps = []
    for index, step in enumerate(graph.steps):
        fields, own = _to_json(step)
        steps.append(fields)
        tensors |= {f"{index}.{name}": tensor for name, tensor in own.items()}
    outputs = []
    for index, output in enumerate(graph.outputs):
        outputs.append({"value": output.value, "shape": output.shape, "function": output.function, "axis": output.axis})
        if output.order is not None:
            tensors[_order_of(index)] = output.order.clone(memory_format=torch.contiguous_format)
    data = {
        "version": VERSION, "input_shape": graph.input_shape, "grids": list(graph.grids), "steps": steps,
        "outputs": outputs, "structure": graph.structure, "bounds": graph.bounds, "normalization": graph.normalization,
    }  # fmt: skip
    text = json.dumps(data, separators=(",", ":"))
    write_atomic(path, save(tensors, metadata={KEY: text}))


def load_graph(path: Path) -> IntegerGraph:
    """What `save_graph` wrote.

    Raises:
        CheckpointError: a file that is missing, truncated, of another format or version, or not a network.
    """
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(KEY)
            if text is None:
                raise CheckpointError(f"engine: {path} must be an exported integer network, got another file")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        data = json.loads(text)
        if data["version"] != VERSION:
            raise CheckpointError(f"engine: {path} must be of version {VERSION}, got {data['version']!r}")
        graph = _graph(data, tensors)
        check_graph(graph)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"engine: {path} cannot be read: {error.strerror or first_line(error)}") from error
    except _DAMAGED as error:
        raise CheckpointError(f"engine: {path} is damaged: {first_line(error)}") from error
    return graph


def _to_json(step: Step) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What differs from the defaults, and the tensors."""
    fields: dict[str, Any] = {"kind": step.kind}
    tensors: dict[str, Tensor] = {}
    for item in dataclasses.fields(step):
        value = getattr(step, item.name)
        if isinstance(value, Tensor):
            tensors[item.name] = value.clone(memory_format=torch.contiguous_format)  # steps may share one
        elif value != item.default:
            fields[item.name] = value
    if isinstance(step, Layer):
        fields["shape"] = list(step.weight.shape)
        tensors["weight"] = pack_bits(step.weight, stored_bits(step.weight_bits))
    return fields, tensors


def _graph(data: dict[str, Any], tensors: dict[str, Tensor]) -> IntegerGraph:
    names, scales, integers = data["grids"], tensors.pop("grids.scale"), tensors.pop("grids")
    if scales.dtype != torch.float32 or integers.dtype != torch.int16 or integers.shape != (len(scales), 3):
        raise GraphError(f"grids must be fp32 [n] and int16 [n, 3], got {tuple(scales.shape)}, {tuple(integers.shape)}")
    if scales.dim() != 1 or len(set(names)) != len(names) or len(names) != len(scales):
        raise GraphError(f"grids must have one name each, got {len(names)} names of {len(scales)}")
    rows = zip(names, scales.tolist(), integers.tolist(), strict=True)
    grids = {str(name): Grid(scale, *row) for name, scale, row in rows}
    steps = tuple(_step(index, fields, tensors) for index, fields in enumerate(data["steps"]))
    outputs = tuple(_output(index, fields, tensors) for index, fields in enumerate(data["outputs"]))
    if tensors:
        raise GraphError(f"every tensor must be of a step or an output, got {next(iter(tensors))}")
    bounds = {str(name): float(value) for name, value in data["bounds"].items()}
    normalization = data.get("normalization")
    if normalization is not None:
        mean, std = (tuple(float(value) for value in part) for part in normalization)
        normalization = mean, std
    shape = tuple(data["input_shape"])
    return IntegerGraph(shape, grids, steps, outputs, bounds, normalization, data["structure"])


def _output(index: int, fields: dict[str, Any], tensors: dict[str, Tensor]) -> Output:
    fields = fields | {"shape": tuple(fields["shape"])}
    return Output(**fields, order=tensors.pop(_order_of(index), None))


def _order_of(index: int) -> str:
    """The name of an output's tensor."""
    return f"outputs.{index}.order"


def _step(index: int, fields: dict[str, Any], tensors: dict[str, Tensor]) -> Step:
    kind = STEPS[fields.pop("kind")]
    own = {name: tensors.pop(key) for name in kind.tensors if (key := f"{index}.{name}") in tensors}
    if kind is Layer:
        own["weight"] = _weight(own["weight"], fields.pop("shape"), fields["weight_bits"])
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    missing: dict[str, Any] = {
        item.name: None for item in dataclasses.fields(kind) if item.default is dataclasses.MISSING
    }
    return kind(**(missing | given | own))


def _weight(packed: Tensor, shape: list[int], bits: int) -> Tensor:
    if not isinstance(bits, int) or not 2 <= bits <= 8 or len(shape) not in (2, 4):
        raise GraphError(f"a weight must have 2 to 8 bits and 2 or 4 axes, got {bits!r} and {shape!r}")
    if not all(type(side) is int and side > 0 for side in shape):
        raise GraphError(f"a weight's shape must be of integers above 0, got {shape!r}")
    width, size = stored_bits(bits), math.prod(shape)
    if packed.numel() != -(-size * width // 8):
        raise GraphError(f"a weight of {size} integers must have {-(-size * width // 8)} bytes, got {packed.numel()}")
    return unpack_bits(packed, width, size, signed=True).reshape(shape)
