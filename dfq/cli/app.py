"""The command line `dfq`: options in, one function of `dfq.api` called, a table or JSON out."""

from __future__ import annotations

import ctypes
import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from dfq import api
from dfq.cli import commands
from dfq.cli.given import (
    bytes_of,
    layer_bits_of,
    metric_named,
    named_network,
    named_specs,
    objective_words,
    real_images_of,
)
from dfq.cli.options import (
    AverageBits,
    Capture,
    Compile,
    Data,
    DataRoot,
    Device,
    InputShape,
    Json,
    Mean,
    MetricName,
    Minutes,
    Model,
    ModelKwargs,
    NumClasses,
    ObjectiveWords,
    Out,
    Precision,
    RealImages,
    RecipeName,
    Resume,
    Seed,
    Size,
    Std,
    Stem,
    Steps,
    Weights,
    normalization,
)
from dfq.config import PRESETS, RECIPES, TeachConfig
from dfq.data.images import DATASETS, load_images
from dfq.models import ModelSpec
from dfq.results.report import accuracy_table, floats_table
from dfq.running import ranks
from dfq.running.execution import ExecutionError
from dfq.running.loop import Interrupted, NonFiniteError
from dfq.running.progress import ProgressBar, Silent
from dfq_kernels import BackendError, __version__

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich"
)  # fmt: skip


def _version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Data-free quantization: few-bit integer networks from a trained one, without its data."""


errors = Console(stderr=True, soft_wrap=True, highlight=False)


@app.command()
def teach(
    model: Annotated[str, typer.Option(help="Name of the network.")] = "wrn-16-1",
    data: Annotated[str, typer.Option(help=f"Images to train on: {', '.join(DATASETS)}.")] = "fashion-mnist",
    data_root: DataRoot = None,
    stem: Stem = None,
    epochs: Annotated[int, typer.Option(help="Passes over the training images.")] = TeachConfig.epochs,
    batch_size: Annotated[int, typer.Option(help="Images per step.")] = TeachConfig.batch_size,
    learning_rate: Annotated[float, typer.Option(help="Peak of the one-cycle schedule.")] = TeachConfig.learning_rate,
    weight_decay: Annotated[float, typer.Option(help="L2 penalty of SGD.")] = TeachConfig.weight_decay,
    seed: Seed = 0,
    out: Out = Path("run"),
    resume: Resume = False,
    device: Device = "auto",
    precision: Precision = "auto",
    json_output: Json = False,
) -> None:
    """Train a float classifier on real images."""
    config = TeachConfig(epochs, batch_size, learning_rate, weight_decay)
    images = load_images(data, "train", data_root)
    (spec,) = named_specs([model], images.input_shape[0], images.num_classes, stem)
    with _observer(json_output) as observer:
        result = api.teach(
            spec, images, config=config, seed=seed, out=out, test_images=load_images(data, "test", data_root),
            resume=resume, device=device, precision=precision, observer=observer,
        )  # fmt: skip
    _show(result, json_output)


@app.command()
def quantize(
    model: Model = None,
    weights: Weights = None,
    model_kwargs: ModelKwargs = None,
    stem: Stem = None,
    input_shape: InputShape = None,
    num_classes: NumClasses = None,
    preset: Annotated[
        str,
        typer.Option(
            help=f"Bits of weights and activations: {', '.join(PRESETS)}, or any \\[gdfq-]W<2-8>A<2-8>. Edge layers have 8 bits, but in gdfq."
        ),
    ] = "W4A4",
    layer_bits: Annotated[
        list[str] | None, typer.Option(help="Bits of one layer, LAYER=W<bits>A<bits>; may be given more than once.")
    ] = None,
    average_bits: AverageBits = None,
    size: Size = None,
    effort: Annotated[
        str | None,
        typer.Option(
            help="instant (seconds: ranges from batch norms, no images), quick (layer by layer on generated images) or "
            "full (trained as a whole). Default: full; instant for images larger than 128x128 on a CPU."
        ),
    ] = None,
    minutes: Minutes = None,
    recipe: RecipeName = None,
    objective: ObjectiveWords = None,
    steps: Steps = None,
    images: RealImages = None,
    data: Data = None,
    data_root: DataRoot = None,
    metric: MetricName = None,
    mean: Mean = None,
    std: Std = None,
    integers: Annotated[
        bool,
        typer.Option(help="Also make the integer network; a model that has none is refused before the first step."),
    ] = True,
    seed: Seed = 0,
    out: Out = Path("run"),
    resume: Resume = False,
    device: Device = "auto",
    precision: Precision = "auto",
    capture: Capture = "auto",
    compile_networks: Compile = False,
    profile: Annotated[
        bool,
        typer.Option("--profile", help="Write a Chrome trace of the last steps and a table by operator into --out."),
    ] = False,
    json_output: Json = False,
) -> None:
    """Quantize a trained network without any data."""
    said = normalization(mean, std)
    network, spec, shape, classes, test = named_network(
        model, weights, model_kwargs, stem, input_shape, num_classes, data, data_root
    )
    with ranks.joined(device) as mine, _observer(json_output) as observer:
        result = api.quantize(
            network, input_shape=shape, num_classes=classes, objective=objective_words(objective), preset=preset,
            effort=effort, minutes=minutes, recipe=recipe, images=real_images_of(images, shape, said, test), steps=steps, seed=seed,
            out=out, overrides=layer_bits_of(layer_bits or []), average_bits=average_bits, size=bytes_of(size),
            test_images=test, metric=metric_named(metric), resume=resume, normalization=said, integers=integers,
            device=mine, precision=precision, capture=capture, compile=compile_networks, profile=profile, spec=spec,
            observer=observer,
        )  # fmt: skip
        if ranks.rank() == 0:
            _show(result, json_output)


@app.command()
def distill(
    student: Annotated[
        list[str], typer.Option(help="Name of a student network; given more than once, the first is the product.")
    ],
    model: Model = None,
    weights: Weights = None,
    model_kwargs: ModelKwargs = None,
    stem: Stem = None,
    input_shape: InputShape = None,
    num_classes: NumClasses = None,
    recipe: Annotated[
        str, typer.Option(help=f"How images are made and students learn: {', '.join(RECIPES)}.")
    ] = "distill",
    objective: ObjectiveWords = None,
    steps: Steps = None,
    images: RealImages = None,
    data: Data = None,
    data_root: DataRoot = None,
    metric: MetricName = None,
    mean: Mean = None,
    std: Std = None,
    seed: Seed = 0,
    out: Out = Path("run"),
    resume: Resume = False,
    device: Device = "auto",
    precision: Precision = "auto",
    capture: Capture = "auto",
    compile_networks: Compile = False,
    json_output: Json = False,
) -> None:
    """Train a smaller float student on a teacher's knowledge without any data."""
    said = normalization(mean, std)
    network, spec, shape, classes, test = named_network(
        model, weights, model_kwargs, None if model is None or ":" in model else stem, input_shape, num_classes,
        data, data_root,
    )  # fmt: skip
    specs = named_specs(student, shape[0], classes or ModelSpec.num_classes, stem)
    students = [api.seeded_model(item, seed, index) for index, item in enumerate(specs)]
    with _observer(json_output) as observer:
        result = api.distill(
            network, students, input_shape=shape, num_classes=classes, objective=objective_words(objective),
            recipe=recipe, images=real_images_of(images, shape, said, test), steps=steps, seed=seed,
            out=out, test_images=test, metric=metric_named(metric), resume=resume, device=device, precision=precision, capture=capture,
            compile=compile_networks, specs=[spec, *specs], observer=observer,
        )  # fmt: skip
    _show(result, json_output)


app.command()(commands.evaluate)
app.command()(commands.export)
app.command()(commands.inspect)
app.command()(commands.run)
app.command()(commands.info)


@contextmanager
def _observer(json_output: bool) -> Iterator[ProgressBar | None]:
    with Silent() if json_output or ranks.rank() > 0 else ProgressBar(errors) as observer:
        yield observer


def _show(result: api.Result, json_output: bool) -> None:
    if json_output:
        facts = {"out": str(result.folder), "accuracies": result.accuracies, "bytes": result.sizes,
                 "milliseconds": result.milliseconds, "seconds": round(result.seconds, 1),
                 "integer_share": result.integer_share, "floating_point": result.floats,
                 "divergences": result.divergences, "worse": result.worse, "scores": result.scores, "bits": result.bits,
                 "objective": result.objective}  # fmt: skip
        print(json.dumps(facts))
        return
    plain = Console(soft_wrap=True, highlight=False)
    if result.objective and not re.fullmatch(r"classes \[N, \d+\]", result.objective):
        plain.print(f"outputs were taken for {result.objective}; no generator is asked for labels", markup=False)
    rows = [(name, result.accuracies.get(name), size) for name, size in result.sizes.items()]
    columns = {"metric": result.scores, "distance, generated": result.divergences, "ms per image": result.milliseconds}
    Console().print(accuracy_table(rows, f"{result.seconds:.0f} s, exact forward", columns))
    if result.floats:
        Console().print(floats_table(result.floats, result.integer_share or 0.0))
    if result.bits:
        plain.print(
            "bits of weights: " + ", ".join(f"{name} {bits}" for name, bits in result.bits.items()), markup=False
        )
    for name in result.worse:
        plain.print(f"{name} is further from the teacher on generated images than the row above it", markup=False)
    if result.no_integers is not None:
        plain.print(f"no integer network: {result.no_integers}", markup=False)
    plain.print(f"everything is in {result.folder}", markup=False)


def keep_freed_memory() -> None:
    """Tells glibc to reuse freed activations instead of returning them: page faults cost more than the arithmetic."""
    mmap_max, trim_threshold, top_pad = -4, -1, -2  # malloc.h's M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "mallopt"):
        for parameter, value in ((mmap_max, 0), (trim_threshold, 2**31 - 1), (top_pad, 2**26)):
            library.mallopt(parameter, value)


def main(command: Callable[[], Any] = app) -> None:
    """Entry point: exit code 0, or one line that names the cause and 1 (128 + the signal's number if interrupted)."""
    keep_freed_memory()
    sys.path.insert(0, "")  # package.module:factory is looked for in the current folder too, as `python -m` does
    try:
        command()
    except Interrupted as error:
        errors.print(f"dfq: {error}", markup=False)
        raise SystemExit(128 + error.signal_number) from None
    except (
        ValueError,
        NonFiniteError,
        ExecutionError,
        BackendError,
        OSError,
        MemoryError,
        torch.OutOfMemoryError,
    ) as error:
        errors.print(f"error: {' '.join(str(error).split())}", markup=False)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
