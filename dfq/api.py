"""Runs as functions: quantize, distill, teach, load_run. The command line is a thin layer over them."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dfq.arguments import (
    Metric,
    check_metric,
    check_processes,
    image_shape,
    objective_asked,
    own_copy,
    pixel_bounds,
    real_images,
    recipe_asked,
    recipe_of_effort,
    time_limit,
)
from dfq.config import (
    LayerBits,
    QuantConfig,
    Recipe,
    TeachConfig,
    quant_config,
    quant_config_from_json,
    to_json,
)  # fmt: skip
from dfq.data.images import Images, Normalization, check_normalization
from dfq.deploy import check_integers, weight_budget
from dfq.errors import check, integer
from dfq.method.cost import measured_cost, recipe_within
from dfq.method.teaching import TeacherTraining
from dfq.method.trainer import DataFreeTraining
from dfq.models import ModelSpec, build_model
from dfq.network import capture as capture_network
from dfq.network.outputs import check_weights
from dfq.quant import freeze_ranges, prepare
from dfq.quant.quantizers import use_bits
from dfq.results.evaluate import check_test_images
from dfq.results.finish import Result, finish
from dfq.running.checkpoint import CheckpointError, load_weights, tensor_digest, weights_digest
from dfq.running.device import resolve_device, resolve_precision
from dfq.running.execution import Execution
from dfq.running.loop import Observer, run_loop
from dfq.running.profiling import Profiled
from dfq.running.run_folder import BITS, RunFolder, read_config, read_json
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
    minutes: float | None = None,
    recipe: str | Recipe | None = None,
    objective: str | Sequence[str] | None = None,
    images: Images | Tensor | None = None,
    steps: int | None = None,
    seed: int = 0,
    out: str | Path = "run",
    overrides: Mapping[str, LayerBits] | None = None,
    config: QuantConfig | None = None,
    average_bits: float | None = None,
    size: int | None = None,
    test_images: Images | None = None,
    metric: Metric | None = None,
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
    """Quantizes a trained float network without any data.

    Args:
        model: whatever torch.export captures, with batch norms; is copied, not changed. Calls without an integer form
            stay in floating point (see `dfq.prepare`).
        input_shape: `(C, H, W)` of its images.
        num_classes: that its logits must have; left out for a network that is no classifier.
        preset: bits, `W4A4` and so on (`dfq.config.quant_config`); `W4A4` if nothing is given.
        effort: `instant` (ranges from the batch norms alone: seconds, no image is made), `quick` (every layer is
            fitted to its float self on generated images) or `full` (the network is trained as a whole: minutes; the
            default, but of images larger than 128x128 on a CPU, where it is `instant`).
        minutes: instead of `effort`, how long it may take: the best of `dfq.config.LADDER` that a few tried images say
            is no longer. Judging comes on top.
        recipe: instead of `effort`, how exactly: a name of `dfq.config.RECIPES` or a `dfq.config.Recipe`.
        objective: what its outputs are, `classes` or `values`, one word for each or one for all; found from their
            shapes where it is not given (`dfq.method.objective.objective_of`).
        images: real images, where there are a few, without labels: every batch is half of them, half generated ones.
            With `effort="instant"` ranges come from them alone.
        steps: student steps; the recipe's where nothing is given.
        seed: of everything random; the same seed and number of threads give the same bits.
        out: a new folder for config, metrics, pictures and checkpoints.
        overrides: bits by layer name.
        config: a whole `QuantConfig` instead of `preset` and `overrides`; its `ranges` count, not the recipe's.
        average_bits: of all weights: each layer's are chosen, from 2 to 8, by how much the network's outputs suffer on
            generated images; edge layers too, those of `overrides` not. Activations keep the bits of `preset`.
        size: instead, bytes of the integer network's file.
        test_images: real images to judge a classifier by; never trained on.
        metric: your own judge of any network: gets a function of normalised images (on the CPU), returns a number. The
            teacher is judged before the first step.
        normalization: `(mean, std)` per channel of pixels / 255 that the network was trained with, for whoever gives
            the integer network pixels; generated images stay between black and white then. None: that of
            `test_images`, or unknown.
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
        observer: sees every step; its `on_start(plan)`, if it has one, is told what the run will take.

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
    input_shape = image_shape("quantize", input_shape)
    seed = integer("quantize", "seed", seed, 0)
    where = resolve_device(device)
    minutes = time_limit(minutes, effort, recipe, steps)
    if minutes is None:
        recipe = recipe_of_effort(effort, recipe, input_shape, where, real=images is not None)
    check("quantize", "config", config, "a QuantConfig", config is None or isinstance(config, QuantConfig))
    teacher = own_copy("quantize", model)
    meaning = objective_asked("quantize", "model", teacher, input_shape, objective, num_classes, where)
    network = capture_network(teacher, input_shape, "quantize")
    precision = resolve_precision(precision, where)
    if minutes is not None:
        found = recipe_of_run(out) if resume else recipe_within(minutes, teacher, network, meaning, where, precision)
        recipe = "calibrate" if images is not None and found == "analytic" else found
    recipe, steps = recipe_asked("quantize", recipe, steps, meaning)
    real = real_images("quantize", images, input_shape, recipe)
    if config is None:
        preset = preset or "W4A4"
        config = quant_config(preset, ranges=recipe.ranges, overrides=overrides, owner="quantize")
    elif preset is not None or overrides is not None:
        raise ValueError("quantize: config must be given without preset and overrides, got both")
    check_processes("quantize", config, recipe)
    check_test_images(test_images, input_shape, meaning.num_classes, "quantize")
    check_metric("quantize", metric, teacher)
    normalization = check_normalization("quantize", normalization, input_shape[0], test_images)
    students = [copy.deepcopy(prepare(network, config=config)) for _ in range(recipe.students)]
    fresh = copy.deepcopy(students[0])
    if integers and config.integers:
        check_integers(fresh)
    budget = weight_budget(average_bits, size, fresh, config, recipe, real is not None)
    task = DataFreeTraining(
        teacher, list(students), recipe, quant=config, input_shape=input_shape,
        objective=meaning, images=real, bounds=pixel_bounds(normalization), budget=budget, steps=steps,
        seed=seed, device=where, precision=precision, execution=Execution(capture, where, compiled=compile),
        network=network,
    )  # fmt: skip
    settings = {
        "command": "quantize", "weights": weights_digest(model), "model": to_json(spec),
        "input_shape": list(input_shape), "num_classes": meaning.num_classes, "objective": list(meaning.kinds),
        "images": None if real is None else tensor_digest(real),
        "preset": preset, "quant": to_json(config), "average_bits": average_bits, "size": size,
        "recipe": to_json(recipe), "steps": steps,
        "seed": seed, "device": where.type, "precision": task.precision, "compile": compile,
        "normalization": normalization,
    }  # fmt: skip
    started = time.monotonic()
    with RunFolder(Path(out), settings, resume=resume) as folder:
        _announce(task, observer)
        steps_to_run = Profiled(task, folder.path) if profile else task
        run_loop(steps_to_run, folder, resume=resume, observer=observer)
        student = students[0]
        freeze_ranges(student)
        use_bits(fresh, task.bits)
        models: dict[str, nn.Module] = {"teacher": task.teacher}
        for rung, state in task.rungs.items():
            models[RUNG_NAMES[rung]] = _at_rung(fresh, state, where)
        models[RUNG_NAMES[recipe.rungs[-1]]] = student.eval()
        return finish(
            folder, models, student, task, test_images, where, started, normalization, integers=integers, metric=metric
        )


def distill(
    teacher: nn.Module,
    students: list[nn.Module],
    *,
    input_shape: tuple[int, int, int],
    num_classes: int | None = None,
    recipe: str | Recipe = "distill",
    objective: str | Sequence[str] | None = None,
    images: Images | Tensor | None = None,
    steps: int | None = None,
    seed: int = 0,
    out: str | Path = "run",
    test_images: Images | None = None,
    metric: Metric | None = None,
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
        teacher: trained float network with batch norms.
        students: freshly initialised networks with the same outputs, of any architectures; the first is the product,
            all of them are what live generators disagree with. They are trained in place.
        recipe: a name of `dfq.config.RECIPES` or a `dfq.config.Recipe`, one that trains whole networks.
        input_shape, num_classes, objective, images, steps, seed, out, test_images, metric, resume, device, precision,
            capture, compile, observer: as in `quantize`.
        specs: how teacher and students are built by name.

    Returns:
        A `Result`; `result.model` is the first student.

    Raises:
        ValueError, NonFiniteError, ExecutionError, Interrupted: as `quantize`.
    """
    input_shape = image_shape("distill", input_shape)
    seed = integer("distill", "seed", seed, 0)
    networks = isinstance(students, list) and all(isinstance(student, nn.Module) for student in students)
    different = networks and len({id(student) for student in students}) == len(students)
    check("distill", "students", students, "a list of different networks, at least one", different and bool(students))
    check("distill", "specs", specs, "of teacher and students", not specs or len(specs) == len(students) + 1)
    where = resolve_device(device)
    frozen = own_copy("distill", teacher)
    meaning = objective_asked("distill", "teacher", frozen, input_shape, objective, num_classes, where)
    recipe, steps = recipe_asked("distill", recipe, steps, meaning)
    check("distill", "recipe", recipe.name, "one that trains whole networks", "distilled" in recipe.rungs)
    real = real_images("distill", images, input_shape, recipe)
    check_processes("distill", None, recipe)
    check_test_images(test_images, input_shape, meaning.num_classes, "distill")
    check_metric("distill", metric, frozen)
    task = DataFreeTraining(
        frozen, students, replace(recipe, students=len(students)), quant=None,
        input_shape=input_shape, objective=meaning, images=real, steps=steps, seed=seed, device=where,
        precision=resolve_precision(precision, where), execution=Execution(capture, where, compiled=compile),
    )  # fmt: skip
    settings = {
        "command": "distill", "weights": weights_digest(teacher), "model": to_json(specs[1]) if specs else None,
        "specs": to_json(specs or []),
        "quant": None, "input_shape": list(input_shape), "num_classes": meaning.num_classes,
        "objective": list(meaning.kinds), "images": None if real is None else tensor_digest(real),
        "recipe": to_json(recipe),
        "steps": steps, "seed": seed, "device": where.type, "precision": task.precision, "compile": compile,
        "normalization": check_normalization("distill", None, input_shape[0], test_images),
    }  # fmt: skip
    started = time.monotonic()
    with RunFolder(Path(out), settings, resume=resume) as folder:
        _announce(task, observer)
        run_loop(task, folder, resume=resume, observer=observer)
        models = {"teacher": task.teacher, "student": students[0].eval()}
        return finish(folder, models, students[0], task, test_images, where, started, metric=metric)


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
    model = named if model is None else own_copy("load_run", model)
    assert model is not None
    if quant is not None:
        shape = tuple(config["input_shape"])
        model = prepare(check_weights(model, owner="load_run", name="model"), shape, quant)
        use_bits(model, read_json(folder / BITS) if (folder / BITS).exists() else {})
    if not (folder / "model.safetensors").exists():
        raise CheckpointError(
            f"run: {folder} must hold a finished run, model.safetensors is missing; continue with --resume"
        )
    load_weights(model, folder / "model.safetensors")
    return model.eval(), config


def recipe_of_run(out: str | Path) -> str:
    """The name of the recipe of a run that is to be continued."""
    return str(read_config(Path(out))["recipe"]["name"])


def _announce(task: DataFreeTraining, observer: Observer | None) -> None:
    """Tells an observer that wants to know what the run will take."""
    say = getattr(observer, "on_start", None)
    cost = None if say is None else measured_cost(task)
    if say is not None:
        say(f"recipe {task.recipe.name}" + (f": {cost}" if cost else ""))


def _at_rung(fresh: nn.Module, state: dict[str, Any], device: torch.device) -> nn.Module:
    student = copy.deepcopy(fresh).to(device)
    student.load_state_dict(state)
    freeze_ranges(student)
    return student.eval()
