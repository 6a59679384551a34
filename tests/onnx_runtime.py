"""Integer networks in ONNX Runtime."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import onnx
import onnxruntime as ort
import torch
from onnx import numpy_helper
from torch import Tensor

from dfq.engine.check import check_graph
from dfq.engine.graph import IntegerGraph, Output
from dfq.export.onnx import save_onnx
from tests.integer_networks import reference_values


def in_onnx_runtime(graph: IntegerGraph, path: Path, images: Tensor, *, fused: bool) -> list[Tensor]:
    """All outputs; `fused`: with ONNX Runtime's own integer operators, else float operators between the roundings."""
    save_onnx(graph, path)
    parts = [session(path, fused=fused).run(None, {"images": part.numpy()}) for part in images.split(500)]
    return [torch.cat([torch.from_numpy(part) for part in same]) for same in zip(*parts, strict=True)]


def session(path: Path, *, fused: bool, optimized: Path | None = None) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if not fused:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def operators(graph: IntegerGraph, folder: Path) -> Counter[str]:
    """How often ONNX Runtime runs which operator, its optimisation done."""
    save_onnx(graph, folder / "net.onnx")
    session(folder / "net.onnx", fused=True, optimized=folder / "optimized.onnx")
    return Counter(node.op_type for node in onnx.load(str(folder / "optimized.onnx")).graph.node)


def written(graph: IntegerGraph, folder: Path) -> Counter[str]:
    """How often a file has which operator."""
    save_onnx(graph, folder / "net.onnx")
    return Counter(node.op_type for node in onnx.load(str(folder / "net.onnx")).graph.node)


def integers(graph: IntegerGraph, path: Path, images: Tensor, *, fused: bool) -> dict[str, Tensor]:
    """Every value on a grid, by ONNX Runtime, as the engine counts."""
    save_onnx(graph, path)
    model = onnx.load(str(path))
    constants = {item.name: int(numpy_helper.to_array(item)) for item in model.graph.initializer if not item.dims}
    zero_points = {name: constants[f"{name}.zero_point"] for name in graph.grids if f"{name}.zero_point" in constants}
    names = list(zero_points)  # a value that is moved, and then neither read nor quantized, has none
    model.graph.output.extend(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.UINT8, None) for name in names)
    onnx.save(model, str(path))
    found = session(path, fused=fused).run(names, {"images": images.numpy()})
    return {name: torch.from_numpy(value).long() - zero_points[name] + graph.grids[name].zero_point
            for name, value in zip(names, found, strict=True)}  # fmt: skip


def from_a_tie(graph: IntegerGraph, name: str, images: Tensor) -> Tensor:
    """How far a value's real numbers are from where rounding changes, in steps of its grid; 0 within fp32's error."""
    index = next(index for index, step in enumerate(graph.steps) if name in step.outs)
    steps = (*graph.steps[:index], replace(graph.steps[index], outs=("t",)))
    made = {out for step in steps for out in step.outs}
    grids = {key: grid for key, grid in graph.grids.items() if key in made}
    output = Output("t", check_graph(graph)[name])
    alone = replace(graph, steps=steps, grids=grids, outputs=(output,), structure=0)
    steps_of_grid = reference_values(alone, images)["t"].double() / graph.grids[name].scale
    return ((steps_of_grid - steps_of_grid.floor() - 0.5).abs() - 1e-6 * steps_of_grid.abs()).clamp(min=0)
