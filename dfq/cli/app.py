"""The command line `dfq`: options in, one function of `dfq.api` called, a table or JSON out."""

from __future__ import annotations

import ctypes
import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import nn

from dfq import api
from dfq.cli import commands
from dfq.cli.options import Data, DataRoot, Device, Json, Mean, Std, normalization
from dfq.config import PRESETS, RECIPES, LayerBits, TeachConfig
from dfq.data.images import DATASETS, Images, load_images
from dfq.models import MODEL_NAMES, ModelSpec, build_model, embedded
from dfq.models.registry import ZOOS
from dfq.network.classifier import check_teacher
from dfq.results.report import accuracy_table, floats_table
from dfq.running.checkpoint import load_weights
from dfq.running.execution import MODES, ExecutionError
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

Model = Annotated[
    str | None,
    typer.Option(
        help=f"{', '.join(MODEL_NAMES)}, timm:NAME, torchvision:NAME, or package.module:factory. Default: the embedded WRN-16-1 teacher for Fashion-MNIST."
    ),
]
Weights = Annotated[
    Path | None,
    typer.Option(
        help="The model's weights: .safetensors, or a torch.save state dict (read with weights_only). Needed with a named --model."
    ),
]
ModelKwargs = Annotated[str | None, typer.Option(help="Keyword arguments of a factory, as a JSON object.")]
Stem = Annotated[
    str | None,
    typer.Option(help="First layers of named models: cifar (stride 1) or imagenet (stride 4). Default: cifar."),
]
InputShape = Annotated[str | None, typer.Option(help="Images of the model as C,H,W. Default: those of --data.")]
NumClasses = Annotated[
    int | None,
    typer.Option(
        help="Classes of the model. Default: as many as it has logits; needed for a named one without --data."
    ),
]
Seed = Annotated[
    int, typer.Option(help="Seed of everything random; the same seed and number of threads give the same bits.")
]
Out = Annotated[Path, typer.Option(help="A new folder for config, metrics, pictures and checkpoints.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")]
Precision = Annotated[
    str, typer.Option(help="Of training: auto, fp32 or bf16. Accuracy is always judged by the exact forward.")
]
Capture = Annotated[
    str,
    typer.Option(help=f"Steps as CUDA graphs: {', '.join(MODES)}. auto: on a GPU, and as they are where that fails."),
]
Compile = Annotated[bool, typer.Option("--compile", help="Networks through torch.compile: a minute at the start.")]
RecipeName = Annotated[
    str | None, typer.Option(help=f"Instead of --effort, how images are made and students learn: {', '.join(RECIPES)}.")
]
Steps = Annotated[int | None, typer.Option(help="Student steps. Default: the recipe's.")]


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
    (spec,) = _specs([model], images.input_shape[0], images.num_classes, stem)
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
    effort: Annotated[
        str | None,
        typer.Option(
            help="instant (seconds: ranges from batch norms, no images), quick (layer by layer on generated images) or full (trained as a whole). Default: full."
        ),
    ] = None,
    recipe: RecipeName = None,
    steps: Steps = None,
    data: Data = None,
    data_root: DataRoot = None,
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
    """Quantize a trained classifier without any data."""
    network, spec, shape, test = _network(model, weights, model_kwargs, stem, input_shape, num_classes, data, data_root)
    with _observer(json_output) as observer:
        result = api.quantize(
            network, input_shape=shape, num_classes=spec.num_classes, preset=preset, effort=effort, recipe=recipe,
            steps=steps, seed=seed, out=out, overrides=_layer_bits(layer_bits or []), test_images=test, resume=resume,
            normalization=normalization(mean, std), integers=integers,
            device=device, precision=precision, capture=capture, compile=compile_networks, profile=profile, spec=spec,
            observer=observer,
        )  # fmt: skip
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
    steps: Steps = None,
    data: Data = None,
    data_root: DataRoot = None,
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
    network, spec, shape, test = _network(
        model, weights, model_kwargs, None if model is None or ":" in model else stem, input_shape, num_classes,
        data, data_root,
    )  # fmt: skip
    specs = _specs(student, shape[0], spec.num_classes, stem)
    students = [api.seeded_model(item, seed, index) for index, item in enumerate(specs)]
    with _observer(json_output) as observer:
        result = api.distill(
            network, students, input_shape=shape, num_classes=spec.num_classes, recipe=recipe, steps=steps, seed=seed,
            out=out, test_images=test, resume=resume, device=device, precision=precision, capture=capture,
            compile=compile_networks, specs=[spec, *specs], observer=observer,
        )  # fmt: skip
    _show(result, json_output)


app.command()(commands.evaluate)
app.command()(commands.export)
app.command()(commands.inspect)
app.command()(commands.run)
app.command()(commands.info)


def _network(
    model: str | None,
    weights: Path | None,
    model_kwargs: str | None,
    stem: str | None,
    input_shape: str | None,
    num_classes: int | None,
    data: str | None,
    data_root: Path | None,
) -> tuple[nn.Module, ModelSpec, tuple[int, int, int], Images | None]:
    """The trained network, how it is built, its image shape, and the test images if any."""
    if model is None:
        options = {"weights": weights, "model_kwargs": model_kwargs, "stem": stem, "input_shape": input_shape,
                   "num_classes": num_classes}  # fmt: skip
        if given := [name for name, value in options.items() if value is not None]:
            raise ValueError(f"dfq: model must be given with {given[0]}, got none")
        images = load_images(data or embedded.DATASET, "test", data_root)
        return embedded.load_teacher(), embedded.SPEC, embedded.INPUT_SHAPE, images
    test = None if data is None else load_images(data, "test", data_root)
    shape = test.input_shape if input_shape is None and test is not None else _shape(input_shape)
    classes = num_classes if num_classes is not None else test.num_classes if test is not None else None
    if classes is None and ":" not in model:
        raise ValueError(f"dfq: num_classes must be given for the named model {model}, or --data, got neither")
    if weights is None and (":" not in model or (model.partition(":")[0] in ZOOS and model_kwargs is None)):
        raise ValueError(f"dfq: weights must be given for the named model {model}, got none")
    (spec,) = _specs([model], shape[0], classes or ModelSpec.num_classes, stem, model_kwargs)
    network = build_model(spec)
    if weights is not None:
        load_weights(network, weights)
    if classes is None:
        found = check_teacher(network, shape, None, device=torch.device("cpu"), owner="dfq", name=f"model {model}")
        spec = replace(spec, num_classes=found)
    return network.eval(), spec, shape, test


def _specs(
    names: list[str], channels: int, classes: int, stem: str | None, model_kwargs: str | None = None
) -> list[ModelSpec]:
    """The networks that were named; `stem` is for those of `dfq.models`, `model_kwargs` for factories."""
    factories = [name for name in names if ":" in name]
    if stem is not None and len(factories) == len(names):
        raise ValueError(f"dfq: stem must be given with a named model, got {stem!r} with {names[0]}")
    if model_kwargs is not None and not factories:
        raise ValueError(f"dfq: model_kwargs must be given with package.module:factory, got them with {names[0]}")
    kwargs = _json_object(model_kwargs or "{}")
    return [ModelSpec(name, channels, classes, stem or "cifar", kwargs) for name in names]


def _shape(text: str | None) -> tuple[int, int, int]:
    parts = [part.strip() for part in (text or "").split(",")]
    if len(parts) != 3 or not all(re.fullmatch("[1-9][0-9]*", part) for part in parts):
        raise ValueError(f"dfq: input_shape must be C,H,W (or --data given), got {text!r}")
    return int(parts[0]), int(parts[1]), int(parts[2])


def _layer_bits(items: list[str]) -> dict[str, LayerBits]:
    overrides = {}
    for item in items:
        match = re.fullmatch("(.+)=W([0-9]+)A([0-9]+)", item)
        if match is None:
            raise ValueError(f"dfq: layer_bits must be LAYER=W<bits>A<bits>, got {item!r}")
        if match[1] in overrides:
            raise ValueError(f"dfq: layer_bits must name a layer once, got {match[1]} again")
        overrides[match[1]] = LayerBits(int(match[2]), int(match[3]))
    return overrides


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"dfq: model_kwargs must be a JSON object, got {text!r}") from error
    if not isinstance(value, dict):
        raise ValueError(f"dfq: model_kwargs must be a JSON object, got {text!r}")
    return value


@contextmanager
def _observer(json_output: bool) -> Iterator[ProgressBar | None]:
    with Silent() if json_output else ProgressBar(errors) as observer:
        yield observer


def _show(result: api.Result, json_output: bool) -> None:
    if json_output:
        facts = {"out": str(result.folder), "accuracies": result.accuracies, "bytes": result.sizes,
                 "milliseconds": result.milliseconds, "seconds": round(result.seconds, 1),
                 "integer_share": result.integer_share, "floating_point": result.floats,
                 "divergences": result.divergences, "worse": result.worse}  # fmt: skip
        print(json.dumps(facts))
        return
    rows = [(name, result.accuracies.get(name), size) for name, size in result.sizes.items()]
    title = f"{result.seconds:.0f} s, exact forward"
    Console().print(accuracy_table(rows, title, milliseconds=result.milliseconds, divergences=result.divergences))
    if result.floats:
        Console().print(floats_table(result.floats, result.integer_share or 0.0))
    plain = Console(soft_wrap=True, highlight=False)
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
