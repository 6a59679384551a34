"""The commands of `dfq` that train nothing: evaluate, export, inspect, run, info."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.console import Console
from torch import fx

from dfq import engine
from dfq.api import load_run
from dfq.cli.options import Backend, DataRoot, Device, Json, Mean, Std, normalization
from dfq.config import PRESETS, RECIPES, to_json
from dfq.data.images import DATASETS, Images, load_images
from dfq.deploy import classify, normalization_of
from dfq.engine import IntegerGraph
from dfq.engine.inspect import facts
from dfq.engine.step_times import timed
from dfq.errors import check
from dfq.models import MODEL_NAMES, embedded
from dfq.quant import layer_bounds, prepared_of
from dfq.quant.inspect import student_facts
from dfq.results.evaluate import accuracy, check_test_images
from dfq.results.picture import save_picture
from dfq.results.report import accuracy_table, bounds_table, engine_tables, model_bytes
from dfq.running.device import resolve_device, resolve_precision
from dfq.running.run_folder import versions
from dfq.student import export_onnx, integer_graph
from dfq_kernels import extension
from dfq_kernels.dispatch import TABLE, chosen

Network = Annotated[Path, typer.Argument(help="A file that dfq export wrote.")]


def evaluate(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run, or a file that dfq export wrote.")],
    data: Annotated[
        str | None,
        typer.Option(help=f"Test images: {', '.join(DATASETS)}. Default: fashion-mnist, for a network of its pixels."),
    ] = None,
    data_root: DataRoot = None,
    device: Device = "auto",
    backend: Backend = None,
    json_output: Json = False,
) -> None:
    """Judge a run's network, or an exported one, on real test images: in integers, or by the exact forward."""
    where = resolve_device(device)
    if run.is_file():
        network = engine.load(run, where, backend)
        images = _test_images(data, data_root, network.graph.normalization)
        check_test_images(images, network.graph.input_shape, network.graph.num_classes, "evaluate")
        value, size, bounds = accuracy(network, images, device=where), run.stat().st_size, []
    else:
        model, config = load_run(run)
        images = _test_images(data, data_root, config.get("normalization"))
        check_test_images(images, config["input_shape"], config["num_classes"], "evaluate")
        value, size = accuracy(model.to(where), images, device=where), model_bytes(model)
        bounds = layer_bounds(model) if config["quant"] is not None else []  # type: ignore[arg-type]
    facts = {"run": str(run), "accuracy": value, "images": len(images), "bytes": size, "layers": to_json(bounds)}
    if json_output:
        print(json.dumps(facts))
        return
    how = "integers" if run.is_file() else "exact forward"
    Console().print(accuracy_table([(str(run), value, size)], f"{len(images)} test images, {how}"))
    if bounds:
        Console().print(bounds_table(bounds))


def _test_images(data: str | None, root: Path | None, normalization: Any) -> Images:
    """The images that were asked for; without a word those of Fashion-MNIST, for a network that takes its pixels."""
    if data is None:
        fashion = json.loads(json.dumps(normalization_of(embedded.DATASET)))
        same = json.loads(json.dumps(normalization)) == fashion
        check("evaluate", "data", data, f"given (--data) for a network that does not take {embedded.DATASET}", same)
    return load_images(data or embedded.DATASET, "test", root)


def export(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The file to write.")] = Path("integers.safetensors"),
    mean: Mean = None,
    std: Std = None,
    data: Annotated[
        str | None,
        typer.Option(help="Data set whose mean and deviation pixels get. Default: what the run was given."),
    ] = None,
    onnx: Annotated[
        Path | None,
        typer.Option(help="Also write it as ONNX (QDQ) to this file; needs onnx, for float parts onnxscript."),
    ] = None,
    json_output: Json = False,
) -> None:
    """Write a run's network as integers: packed weights, exact constants."""
    said = normalization(mean, std)
    check("export", "data", data, "given without --mean and --std", data is None or said is None)
    model, config = load_run(run)
    said = said or (normalization_of(data) if data is not None else config.get("normalization"))
    floats = prepared_of(model).floats
    if onnx is not None:
        export_onnx(model, onnx)  # type: ignore[arg-type]
    if onnx is not None and floats:
        said_so = f"{onnx} is written; {out} is not: {len(floats)} calls stay in floating point ({floats[0][1]}, ...)"
        print(json.dumps({"file": None, "onnx": str(onnx), "floating_point": len(floats)}) if json_output else said_so)
        return
    graph = integer_graph(model, said)
    engine.save_graph(graph, out)
    found = {"file": str(out), **facts(graph, out)}
    if json_output:
        print(json.dumps(found))
        return
    _show(found)


def inspect(
    network: Annotated[Path, typer.Argument(help="A file that dfq export wrote, or the folder of a finished run.")],
    picture: Annotated[
        Path | None, typer.Option(help="Draw the network into this PNG, with the time of every step on this CPU.")
    ] = None,
    json_output: Json = False,
) -> None:
    """Steps, values, bits, sizes and bounds of an integer network; of a run, also what stays in floating point."""
    graph, found = _run_facts(network) if network.is_dir() else _file_facts(network)
    if picture is not None:
        found = found if graph is None else timed(found, graph)
        save_picture(found, picture)
    if json_output:
        print(json.dumps(found))
        return
    _show(found)


def _file_facts(path: Path) -> tuple[IntegerGraph, dict[str, Any]]:
    graph = engine.load_graph(path)
    return graph, {"file": str(path), **facts(graph, path)}


def _run_facts(folder: Path) -> tuple[IntegerGraph | None, dict[str, Any]]:
    """The network of a run as integers, or where it has parts in floating point as it was trained; then no graph."""
    model, config = load_run(folder)
    check("inspect", "network", str(folder), "a run whose network is quantized", config["quant"] is not None)
    student, known = cast(fx.GraphModule, model), prepared_of(model)
    if known.floats or not known.config.integers:
        found = student_facts(student) | {"normalization": config.get("normalization")}
        return None, {"file": str(folder), "bytes": model_bytes(model), **found}
    graph = integer_graph(model, config.get("normalization"))
    return graph, {"file": str(folder), **facts(graph), "bytes": model_bytes(model)}


def _show(found: dict[str, Any]) -> None:
    for table in engine_tables(found):
        Console().print(table)
    takes = "normalised numbers only: nobody said their --mean and --std, so it takes no pixels"
    if found["normalization"]:
        mean, std = (", ".join(map(str, part)) for part in found["normalization"])
        takes = f"pixels, as (pixels / 255 - mean) / std with mean {mean} and std {std}"
    Console(soft_wrap=True, highlight=False).print(f"input: {takes}", markup=False)


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


def info(json_output: Json = False) -> None:
    """What this installation has: models, presets, recipes, data sets, operators, machine."""
    device = resolve_device("auto")
    facts: dict[str, Any] = {
        "native module": extension.built(),
        "versions": versions(), "device": str(device), "precision": resolve_precision("auto", device),
        "models": MODEL_NAMES, "presets": PRESETS, "recipes": to_json(RECIPES), "data": list(DATASETS),
        "embedded teacher": embedded.teacher_facts(),
        "operators": {op: chosen(op, device.type) for op in TABLE},
    }  # fmt: skip
    if json_output:
        print(json.dumps(facts))
        return
    for name, value in facts.items():
        text = (
            json.dumps(value)
            if isinstance(value, dict)
            else ", ".join(value)
            if isinstance(value, (list, tuple))
            else value
        )
        Console(soft_wrap=True, highlight=False).print(f"[bold]{name}[/bold]: ", end="")
        print(text)
