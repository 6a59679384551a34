"""What a run made: judged, pictured, written."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dfq.arguments import Metric, score
from dfq.config import to_json
from dfq.data.images import Images, Normalization
from dfq.deploy import milliseconds
from dfq.engine import Engine, save_graph
from dfq.method.trainer import DataFreeTraining
from dfq.quant import layer_bounds
from dfq.quant.inspect import student_facts
from dfq.results.evaluate import accuracy
from dfq.results.report import model_bytes, save_curves, save_image_grid
from dfq.running import ranks
from dfq.running.checkpoint import save_weights
from dfq.running.run_folder import BITS, RunFolder
from dfq.student import integer_graph

HELD_PIXELS, HELD_LEAST = 2**18, 16  # of generated images that rungs are compared on: fewer large ones
SHOWN = 10  # images of each member of the pool in a run's picture


@dataclass(frozen=True)
class Result:
    """What a run made.

    model: the trained network in evaluation mode (fake-quantized: exact forward); folder: where everything is;
    rungs: the same network after every rung that was climbed, by name (`analytic`, `DF-Q`, `reconstructed`,
    `DF-QAT-KD`), the last one is `model`; empty for float students;
    accuracies: percent by name (`teacher`, the rungs, `student`, `integers`), empty without test images;
    scores: what the user's metric gave, by the same names;
    divergences: of each rung from the teacher on generated images that nothing was trained on, as
    `Objective.divergences` says; empty where no images were made; worse: rungs that are further from the teacher than
    the one before, by more than chance;
    bits: of weights by layer, where they were chosen by a budget;
    objective: what the outputs were taken for, as `classes [N, 10]`; empty for `teach`;
    sizes: bytes by the same names; milliseconds: of one image on the CPU, by name;
    integers: the network as integers, also in the folder; None where it cannot be one, and why not in `no_integers`;
    integer_share: of the quantized network's multiplications, 0 to 1 (None for float networks); floats: its calls in
    floating point, as `dfq.quant.inspect.student_facts` has them.
    """

    model: nn.Module
    folder: Path
    rungs: dict[str, nn.Module]
    accuracies: dict[str, float]
    sizes: dict[str, int]
    milliseconds: dict[str, float]
    integers: Engine | None
    no_integers: str | None
    seconds: float
    integer_share: float | None = None
    floats: tuple[dict[str, Any], ...] = ()
    divergences: dict[str, float] = field(default_factory=dict)
    worse: tuple[str, ...] = ()
    scores: dict[str, float] = field(default_factory=dict)
    bits: dict[str, int] = field(default_factory=dict)
    objective: str = ""

    @property
    def calibrated(self) -> nn.Module | None:
        """DF-Q: ranges from generated images, nothing trained; None where the run has no such rung."""
        return self.rungs.get("DF-Q")


def finish(
    folder: RunFolder,
    models: dict[str, nn.Module],
    product: nn.Module,
    task: DataFreeTraining | None,
    test_images: Images | None,
    device: torch.device,
    started: float,
    normalization: Normalization | None = None,
    *,
    integers: bool = True,
    metric: Metric | None = None,
) -> Result:
    """Writes weights, pictures and result.json, and judges every model by its exact forward: the first process does."""
    rungs = {name: model for name, model in models.items() if name != "teacher"} if task and task.quant else {}
    if not folder.writes:
        return Result(product, folder.path, rungs, {}, {}, {}, None, None, time.monotonic() - started)
    with ranks.alone():
        return _finish(
            folder, models, rungs, product, task, test_images, device, started, normalization, integers, metric
        )


def _finish(
    folder: RunFolder,
    models: dict[str, nn.Module],
    rungs: dict[str, nn.Module],
    product: nn.Module,
    task: DataFreeTraining | None,
    test_images: Images | None,
    device: torch.device,
    started: float,
    normalization: Normalization | None,
    integers: bool,
    metric: Metric | None,
) -> Result:
    if task is not None and task.bits:
        folder.write_json(BITS, task.bits)
    save_weights(product, folder.model)
    save_curves(folder.metrics(), folder.path / "curves.png")
    if task is not None and task.sources:
        drawn = zip(task.pool_names(), task.pool.sample(), strict=True)
        pictures = [
            (name, images[:SHOWN], None if labels is None else labels[:SHOWN]) for name, (images, labels) in drawn
        ]
        save_image_grid(pictures, folder.path / "images.png")
    sizes = {name: model_bytes(model) for name, model in models.items()}
    engine, why_not = (None, None)
    quantized = task if task is not None and task.quant is not None else None
    if integers and quantized is not None:
        engine, why_not = _integers(product, quantized, folder, normalization)
    judged: dict[str, Any] = dict(models)
    if engine is not None:
        judged["integers"], sizes["integers"] = engine, folder.integers.stat().st_size
    accuracies = {}
    if test_images is not None:
        where = {"integers": torch.device("cpu")}
        accuracies = {
            name: accuracy(item, test_images, device=where.get(name, device)) for name, item in judged.items()
        }
    scores = {} if metric is None else {name: score("metric", metric, item) for name, item in judged.items()}
    times = {}
    if engine is not None and device.type == "cpu":
        shape = engine.graph.input_shape
        times = {"teacher": milliseconds(models["teacher"], shape), "integers": milliseconds(engine, shape)}
    seconds = time.monotonic() - started
    facts = {
        "accuracies": accuracies,
        "scores": scores,
        "bytes": sizes,
        "milliseconds": times,
        "seconds": round(seconds, 1),
    }
    if task is not None:
        moments = task.moments
        facts["images"] = {
            "mean": moments.mean.tolist(), "deviation": moments.deviation, "assumed": moments.assumed
        }  # fmt: skip
    if why_not is not None:
        facts["no_integers"] = why_not
    share, floats = None, ()
    found, worse = _held_out(quantized, rungs) if quantized is not None and quantized.sources else ({}, ())
    if quantized is not None:
        facts["layers"] = to_json(layer_bounds(product))  # type: ignore[arg-type, assignment]
        inside = student_facts(product)  # type: ignore[arg-type]
        share, floats = inside["integer_share"], tuple(inside["floats"])
        facts |= {"integer_share": share, "floating_point": floats, "divergences": found, "worse": worse}
    folder.write_json("result.json", facts)
    return Result(
        product, folder.path, rungs, accuracies, sizes, times, engine, why_not, seconds, share, floats, found, worse,
        scores, {} if task is None else task.bits, "" if task is None else task.objective.describe(),
    )  # fmt: skip


@torch.no_grad()
def _held_out(task: DataFreeTraining, rungs: dict[str, nn.Module]) -> tuple[dict[str, float], tuple[str, ...]]:
    """How far every rung is from the teacher on generated images that no rung has seen, and which are worse.

    Worse: further away than the rung before by more than two standard errors of the images' differences.
    """
    count = max(HELD_PIXELS // math.prod(task.input_shape[1:]), HELD_LEAST)
    batches = -(-count // task.recipe.batch_size)
    images = torch.cat([task.pool.generated("held out", batch) for batch in range(batches)])[:count].float()
    wanted = task.teacher(images)
    each = {name: task.objective.divergences(wanted, model(images)) for name, model in rungs.items()}
    worse = []
    for (_, before), (name, after) in pairwise(each.items()):
        difference = after - before
        if float(difference.mean()) > 2 * float(difference.std()) / len(difference) ** 0.5:
            worse.append(name)
    return {name: float(values.mean()) for name, values in each.items()}, tuple(worse)


def _integers(
    product: nn.Module, task: DataFreeTraining, folder: RunFolder, normalization: Normalization | None
) -> tuple[Engine | None, str | None]:
    """The product in integers, written into the folder; or why its config is not one of an integer network."""
    assert task.quant is not None
    if not task.quant.integers:
        return None, task.quant.why_no_integers
    try:
        graph = integer_graph(product, normalization)
        engine = Engine(graph)
    except ValueError as error:  # an ExportError: training took a sum past int32
        return None, str(error)
    save_graph(graph, folder.integers)
    return engine, None
