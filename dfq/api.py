"""Runs as functions: quantize, distill, teach, load_run. The command line is a thin layer over them."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dfq.config import (
    EFFORTS,
    LayerBits,
    QuantConfig,
    Recipe,
    TeachConfig,
    quant_config,
    quant_config_from_json,
    recipe_named,
    to_json,
)  # fmt: skip
from dfq.data.images import Images, Normalization, check_normalization
from dfq.deploy import check_integers
from dfq.errors import check, first_line, integer
from dfq.method.teaching import TeacherTraining
from dfq.method.trainer import DataFreeTraining
from dfq.models import ModelSpec, build_model
from dfq.network import capture as capture_network
from dfq.network.classifier import check_teacher, check_weights
from dfq.quant import freeze_ranges, prepare
from dfq.results.evaluate import check_test_images
from dfq.results.finish import Result, finish
from dfq.running.checkpoint import CheckpointError, load_weights, weights_digest
from dfq.running.device import resolve_device, resolve_precision
from dfq.running.execution import Execution
from dfq.running.loop import Observer, run_loop
from dfq.running.profiling import Profiled
from dfq.running.run_folder import RunFolder, read_config
from dfq.running.seeds import seeded_initialisation

RUNG_NAMES = {"analytic": "analytic", "calibrated": "DF-Q", "reconstructed": "reconstructed", "distilled": "DF-QAT-KD"}
"""What a run's table calls a rung of `dfq.config.RUNGS`."""


def quantize(
    model: nn.Module,
    *,
    input_shape: tuple[int, int, int],
    num_classes: int | None = None,
    preset: str | None = None,
    effort: str | None = None,
    recipe: str | Recipe | None = None,
    steps: int | None = None,
    seed: int = 0,
    out: str | Path = "run",
    overrides: Mapping[str, LayerBits] | None = None,
    config: QuantConfig | None = None,
    test_images: Images | None = None,
    normalization: Normalization | None = None,
    integers: bool = True,
    resume: bool = False,
    device: str = "auto",
    precision: str = "auto",
    capture: str = "auto",
    compile: bool = False,
    profile: bool = False,
    spec: ModelSpec | None = None,
    observer: Observer | None = None,
) -> Result:
    """Quantizes a trained float classifier without any data.

    Args:
        model: whatever torch.export captures, with batch norms; is copied, not changed. Calls without an integer form
            stay in floating point (see `dfq.prepare`).
        input_shape: `(C, H, W)` of its images.
        num_classes: of its logits; found out where it is not given.
        preset: bits, `W4A4` and so on (`dfq.config.quant_config`); `W4A4` if nothing is given.
        effort: `instant` (ranges from the batch norms alone: seconds, no image is made), `quick` (every layer is
            fitted to its float self on generated images) or `full` (the network is trained as a whole: minutes; the
            default).
        recipe: instead of `effort`, how exactly: a name of `dfq.config.RECIPES` or a `dfq.config.Recipe`.
        steps: student steps; the recipe's where nothing is given.
        seed: of everything random; the same seed and number of threads give the same bits.
        out: a new folder for config, metrics, pictures and checkpoints.
        overrides: bits by layer name.
        config: a whole `QuantConfig` instead of `preset` and `overrides`; its `ranges` count, not the recipe's.
        test_images: real images to judge by; never trained on.
        normalization: `(mean, std)` per channel of pixels / 255 that the network was trained with, for whoever gives
            the integer network pixels; None: that of `test_images`, or unknown.
        integers: also make the integer network, and refuse a model that has none before the first step. A config that
            no integer network has (`gdfq`) is trained without one.
        resume: continue the run in `out`.
        device: `auto`, `cpu`, `cuda`, `cuda:N`.
        precision: `auto`, `fp32`, `bf16` (autocast in training; judged by the exact forward always).
        capture: steps as CUDA graphs. `auto`: captured on a GPU; if capture fails, a warning, and steps run uncaptured.
            `on`: captured, or an error. `off`: not. The bits are the same.
        compile: networks go through `torch.compile` (a minute at the start).
        profile: writes a Chrome trace of the last ten steps and a table by operator into `out`.
        spec: how `model` is built by name, so that `dfq evaluate OUT` can build it again.
        observer: sees every step.

    Returns:
        A `Result`; `result.model` is the fake-quantized network in evaluation mode.

    Raises:
        ValueError: an argument out of its rule, a model without batch norms, one that cannot be captured
            (`PrepareError`) or, if `integers`, that has parts without an integer form (`ExportError`), a folder that
            cannot be written or resumed (`CheckpointError`).
        NonFiniteError: training diverged; names the term.
        ExecutionError: a step or network that cannot be captured or compiled, and had to be.
        Interrupted: Ctrl-C or SIGTERM, after saving.
    """
    input_shape = _sizes("quantize", input_shape)
    seed = integer("quantize", "seed", seed, 0)
    recipe, steps = _recipe("quantize", _recipe_of_effort(effort, recipe), steps)
    check("quantize", "config", config, "a QuantConfig", config is None or isinstance(config, QuantConfig))
    if config is None:
        preset = preset or "W4A4"
        config = quant_config(preset, ranges=recipe.ranges, overrides=overrides, owner="quantize")
    elif preset is not None or overrides is not None:
        raise ValueError("quantize: config must be given without preset and overrides, got both")
    where = resolve_device(device)
    teacher = _copy("quantize", model)
    num_classes = _classes("quantize", "model", teacher, input_shape, num_classes, where)
    check_test_images(test_images, input_shape, num_classes, "quantize")
    normalization = check_normalization("quantize", normalization, input_shape[0], test_images)
    network = capture_network(teacher, input_shape, "quantize")
    students = [copy.deepcopy(prepare(network, config=config)) for _ in range(recipe.students)]
    fresh = copy.deepcopy(students[0])
    if integers and config.integers:
        check_integers(fresh)
    task = DataFreeTraining(
        teacher, list(students), recipe, quant=config, input_shape=input_shape,
        num_classes=num_classes, steps=steps, seed=seed, device=where, precision=resolve_precision(precision, where),
        execution=Execution(capture, where, compiled=compile), network=network,
    )  # fmt: skip
    settings = {
        "command": "quantize", "weights": weights_digest(model), "model": to_json(spec),
        "input_shape": list(input_shape), "num_classes": num_classes,
        "preset": preset, "quant": to_json(config), "recipe": to_json(recipe), "steps": steps, "seed": seed,
        "device": where.type, "precision": task.precision, "compile": compile, "normalization": normalization,
    }  # fmt: skip
    started = time.monotonic()
    with RunFolder(Path(out), settings, resume=resume) as folder:
        steps_to_run = Profiled(task, folder.path) if profile else task
        run_loop(steps_to_run, folder, resume=resume, observer=observer)
        student = students[0]
        freeze_ranges(student)
        models: dict[str, nn.Module] = {"teacher": task.teacher}
        for rung, state in task.rungs.items():
            models[RUNG_NAMES[rung]] = _at_rung(fresh, state, where)
        models[RUNG_NAMES[recipe.rungs[-1]]] = student.eval()
        return finish(folder, models, student, task, test_images, where, started, normalization, integers=integers)


def distill(
    teacher: nn.Module,
    students: list[nn.Module],
    *,
    input_shape: tuple[int, int, int],
    num_classes: int | None = None,
    recipe: str | Recipe = "distill",
    steps: int | None = None,
    seed: int = 0,
    out: str | Path = "run",
    test_images: Images | None = None,
    resume: bool = False,
    device: str = "auto",
    precision: str = "auto",
    capture: str = "auto",
    compile: bool = False,
    specs: list[ModelSpec] | None = None,
    observer: Observer | None = None,
) -> Result:
    """Trains smaller float students on a teacher's knowledge without any data: the paper's compression half.

    Args:
        teacher: trained float classifier with batch norms.
        students: freshly initialised classifiers, of any architectures; the first is the product, all of them are what
            live generators disagree with. They are trained in place.
        recipe: a name of `dfq.config.RECIPES` or a `dfq.config.Recipe`, one that trains whole networks.
        input_shape, num_classes, steps, seed, out, test_images, resume, device, precision, capture, compile,
            observer: as in `quantize`.
        specs: how teacher and students are built by name.

    Returns:
        A `Result`; `result.model` is the first student.

    Raises:
        ValueError, NonFiniteError, ExecutionError, Interrupted: as `quantize`.
    """
    input_shape = _sizes("distill", input_shape)
    seed = integer("distill", "seed", seed, 0)
    recipe, steps = _recipe("distill", recipe, steps)
    trains = bool(recipe.generators) and "distilled" in recipe.rungs
    check("distill", "recipe", recipe.name, "one with generators that trains whole networks", trains)
    networks = isinstance(students, list) and all(isinstance(student, nn.Module) for student in students)
    different = networks and len({id(student) for student in students}) == len(students)
    check("distill", "students", students, "a list of different networks, at least one", different and bool(students))
    check("distill", "specs", specs, "of teacher and students", not specs or len(specs) == len(students) + 1)
    where = resolve_device(device)
    frozen = _copy("distill", teacher)
    num_classes = _classes("distill", "teacher", frozen, input_shape, num_classes, where)
    check_test_images(test_images, input_shape, num_classes, "distill")
    task = DataFreeTraining(
        frozen, students, replace(recipe, students=len(students)), quant=None,
        input_shape=input_shape, num_classes=num_classes, steps=steps, seed=seed, device=where,
        precision=resolve_precision(precision, where), execution=Execution(capture, where, compiled=compile),
    )  # fmt: skip
    settings = {
        "command": "distill", "weights": weights_digest(teacher), "model": to_json(specs[1]) if specs else None,
        "specs": to_json(specs or []),
        "quant": None, "input_shape": list(input_shape), "num_classes": num_classes, "recipe": to_json(recipe),
        "steps": steps, "seed": seed, "device": where.type, "precision": task.precision, "compile": compile,
        "normalization": check_normalization("distill", None, input_shape[0], test_images),
    }  # fmt: skip
    started = time.monotonic()
    with RunFolder(Path(out), settings, resume=resume) as folder:
        run_loop(task, folder, resume=resume, observer=observer)
        models = {"teacher": task.teacher, "student": students[0].eval()}
        return finish(folder, models, students[0], task, test_images, where, started)


def teach(
    spec: ModelSpec,
    images: Images,
    *,
    config: TeachConfig | None = None,
    seed: int = 0,
    out: str | Path = "run",
    test_images: Images | None = None,
    resume: bool = False,
    device: str = "auto",
    precision: str = "auto",
    observer: Observer | None = None,
) -> Result:
    """Trains a float classifier on real images.

    Args:
        spec: the network.
        images: to train on; `test_images`: to judge by.
        config: epochs, batch size, rates.
        seed, out, resume, device, precision, observer: as in `quantize`.

    Returns:
        A `Result`; `result.model` is the trained network.

    Raises:
        ValueError, NonFiniteError, Interrupted: as `quantize`.
    """
    check("teach", "spec", spec, "a ModelSpec", isinstance(spec, ModelSpec))
    check("teach", "images", type(images).__name__, "dfq.data.Images", isinstance(images, Images))
    seed = integer("teach", "seed", seed, 0)
    check_test_images(test_images, images.input_shape, images.num_classes, "teach")
    config = config or TeachConfig()
    where = resolve_device(device)
    with seeded_initialisation(seed, "model"):
        model = build_model(spec)
    task = TeacherTraining(
        model, images, config, seed=seed, device=where, precision=resolve_precision(precision, where)
    )  # fmt: skip
    settings = {
        "command": "teach", "model": to_json(spec), "quant": None, "input_shape": list(images.input_shape),
        "num_classes": images.num_classes, "teach": to_json(config), "seed": seed, "images": images.digest(),
        "device": where.type, "precision": task.precision,
        "normalization": check_normalization("teach", None, images.input_shape[0], images),
    }  # fmt: skip
    started = time.monotonic()
    with RunFolder(Path(out), settings, resume=resume) as folder:
        run_loop(task, folder, resume=resume, observer=observer)
        return finish(folder, {"teacher": model.eval()}, model, None, test_images, where, started)


def seeded_model(spec: ModelSpec, seed: int, index: int) -> nn.Module:
    """The freshly initialised network of `spec`; each `index` has weights of its own."""
    with seeded_initialisation(seed, "student", index):
        return build_model(spec)


def load_run(path: str | Path, model: nn.Module | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """The product of a finished run, in evaluation mode, and the run's config.

    Args:
        path: the run's folder.
        model: the float network, for a run whose model was not built by name.

    Raises:
        CheckpointError: no finished run there, or a model that does not fit it.
    """
    folder = Path(path)
    config = read_config(folder)
    if model is None and config["model"] is None:
        raise CheckpointError(f"run: {folder} must be loaded with its float model, it was not built by name")
    try:
        spec = None if config["model"] is None else ModelSpec(**config["model"])
        quant = None if config["quant"] is None else quant_config_from_json(config["quant"])
        named = None if spec is None or model is not None else build_model(spec)
    except (TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"run: {folder} must hold a run's config.json, got a damaged one: {error}") from error
    model = named if model is None else _copy("load_run", model)
    assert model is not None
    if quant is not None:
        shape = tuple(config["input_shape"])
        model = prepare(check_weights(model, owner="load_run", name="model"), shape, quant)
    if not (folder / "model.safetensors").exists():
        raise CheckpointError(
            f"run: {folder} must hold a finished run, model.safetensors is missing; continue with --resume"
        )
    load_weights(model, folder / "model.safetensors")
    return model.eval(), config


def _sizes(owner: str, input_shape: Any) -> tuple[int, int, int]:
    three = isinstance(input_shape, (tuple, list, torch.Size)) and len(input_shape) == 3
    check(owner, "input_shape", input_shape, "(C, H, W)", three)
    channels, height, width = (integer(owner, "input_shape", size, 1) for size in input_shape)
    return channels, height, width


def _classes(
    owner: str, name: str, model: nn.Module, input_shape: tuple[int, int, int], num_classes: Any, device: torch.device
) -> int:
    """The number of classes that was given, or that the model has."""
    known = None if num_classes is None else integer(owner, "num_classes", num_classes, 2)
    check_weights(model, owner=owner, name=name)
    return check_teacher(model.to(device), input_shape, known, device=device, owner=owner, name=name)


def _recipe_of_effort(effort: str | None, recipe: str | Recipe | None) -> str | Recipe:
    check("quantize", "effort", effort, "given without recipe", effort is None or recipe is None)
    if recipe is not None:
        return recipe
    effort = "full" if effort is None else effort
    check("quantize", "effort", effort, f"one of {', '.join(EFFORTS)}", effort in EFFORTS)
    return EFFORTS[effort]


def _recipe(owner: str, recipe: Any, steps: int | None) -> tuple[Recipe, int]:
    """The recipe, and its student steps or those that were asked for."""
    check(owner, "recipe", recipe, "a name or a Recipe", isinstance(recipe, (str, Recipe)))
    recipe = recipe_named(recipe, owner) if isinstance(recipe, str) else recipe
    if "distilled" not in recipe.rungs:
        check(
            owner, "steps", steps, f"left out with recipe {recipe.name}, which trains no whole network", steps is None
        )
        return recipe, 0
    return recipe, recipe.steps if steps is None else integer(owner, "steps", steps, 1)


def _at_rung(fresh: nn.Module, state: dict[str, Any], device: torch.device) -> nn.Module:
    student = copy.deepcopy(fresh).to(device)
    student.load_state_dict(state)
    freeze_ranges(student)
    return student.eval()


def _copy(owner: str, model: Any) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise ValueError(f"{owner}: model must be a torch.nn.Module, got {type(model).__name__}")
    try:
        return copy.deepcopy(model)
    except Exception as error:  # weights that a hook computes (old weight_norm, pruning) cannot be copied
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ValueError(f"{owner}: model must be copyable (remove weight_norm and pruning), got {reason}") from error
