"""The commands of `dfq` around integer networks: export, inspect, run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from dfq import engine
from dfq.api import load_run
from dfq.deploy import classify, integer_graph
from dfq.engine.inspect import facts
from dfq.onnx_export import save_onnx
from dfq.options import Backend, Json
from dfq.report import engine_table

Network = Annotated[Path, typer.Argument(help="A file that dfq export wrote.")]


def export(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The file to write.")] = Path("model.safetensors"),
    data: Annotated[
        str | None,
        typer.Option(help="Data set whose mean and deviation pixels get. Default: fashion-mnist where it fits."),
    ] = None,
    onnx: Annotated[
        Path | None, typer.Option(help="Also write it as ONNX (QDQ) to this file; needs the package onnx.")
    ] = None,
    json_output: Json = False,
) -> None:
    """Write a run's network as integers: packed weights, exact constants."""
    model, config = load_run(run)
    graph = integer_graph(model, tuple(config["input_shape"]), config["num_classes"], data)
    if onnx is not None:
        save_onnx(graph, onnx)
    engine.save_graph(graph, out)
    found = {"file": str(out), **facts(graph, out)}
    if json_output:
        print(json.dumps(found))
        return
    Console().print(engine_table(found))


def inspect(network: Network, json_output: Json = False) -> None:
    """Layers, bits, sizes and bounds of an integer network."""
    found = {"file": str(network), **facts(engine.load_graph(network), network)}
    if json_output:
        print(json.dumps(found))
        return
    Console().print(engine_table(found))


def run(
    network: Network,
    images: Annotated[list[Path], typer.Argument(help="PNG, JPEG or NumPy files (pixels, or normalised numbers).")],
    backend: Backend = None,
    json_output: Json = False,
) -> None:
    """Classify images with an integer network."""
    loaded = engine.load(network, backend=backend)
    for path in images:
        for index, classes in enumerate(classify(loaded, path)):
            if json_output:
                named = [{"class": label, "probability": round(value, 6)} for label, value in classes]
                print(json.dumps({"file": str(path), "image": index, "classes": named}))
            else:
                text = ", ".join(f"{label} ({100 * value:.1f} %)" for label, value in classes)
                print(f"{path}[{index}]: class {text}")
