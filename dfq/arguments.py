"""What people give to a run, as it must be: found out and refused before any work is done."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dfq.config import EFFORTS, QuantConfig, Recipe, recipe_named
from dfq.data.images import Images, Normalization
from dfq.errors import check, first_line, integer
from dfq.method.objective import Objective, objective_of
from dfq.network.outputs import check_weights, evaluation, outputs_of
from dfq.running import ranks

Metric = Callable[[Callable[[Tensor], Any]], float]
"""Judges a network, which takes normalised images and returns what the model returns."""


def image_shape(owner: str, input_shape: Any) -> tuple[int, int, int]:
    """`(C, H, W)` as ints."""
    three = isinstance(input_shape, (tuple, list, torch.Size)) and len(input_shape) == 3
    check(owner, "input_shape", input_shape, "(C, H, W)", three)
    channels, height, width = (integer(owner, "input_shape", size, 1) for size in input_shape)
    return channels, height, width


def own_copy(owner: str, model: Any) -> nn.Module:
    """A copy of a network, which is then not changed."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"{owner}: model must be a torch.nn.Module, got {type(model).__name__}")
    try:
        return copy.deepcopy(model)
    except Exception as error:  # weights that a hook computes (old weight_norm, pruning) cannot be copied
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ValueError(f"{owner}: model must be copyable (remove weight_norm and pruning), got {reason}") from error


def objective_asked(
    owner: str, name: str, model: nn.Module, shape: tuple[int, int, int], kinds: str | Sequence[str] | None,
    num_classes: Any, device: torch.device,
) -> Objective:  # fmt: skip
    """What the outputs of a network mean; the network is run once."""
    known = None if num_classes is None else integer(owner, "num_classes", num_classes, 2)
    check_weights(model, owner=owner, name=name)
    outputs = outputs_of(model.to(device), shape, device=device, owner=owner, name=name)
    return objective_of(outputs, kinds, known, owner=owner, name=name)


LARGE = 128 * 128  # pixels of an image, with which generators take hours on a CPU


def recipe_of_effort(
    effort: str | None, recipe: str | Recipe | None, shape: tuple[int, int, int], device: torch.device, *, real: bool
) -> str | Recipe:
    """The recipe that was given, or that of an effort; real: whether there are real images.

    Where nothing is given it is `full`; of large images on a CPU `instant`, with a warning.
    """
    check("quantize", "effort", effort, "given without recipe", effort is None or recipe is None)
    if recipe is not None:
        return recipe
    if effort is None and device.type == "cpu" and shape[1] * shape[2] > LARGE:
        effort, size = "instant", f"{shape[1]}x{shape[2]}"
        warnings.warn(
            f"quantize: effort is instant, because images of {size} take hours on a CPU with quick or full; say "
            "effort= (--effort) to have one of these", stacklevel=3,
        )  # fmt: skip
    effort = "full" if effort is None else effort
    check("quantize", "effort", effort, f"one of {', '.join(EFFORTS)}", effort in EFFORTS)
    return "calibrate" if real and effort == "instant" else EFFORTS[effort]


def time_limit(minutes: Any, effort: str | None, recipe: Any, steps: int | None) -> float | None:
    """Minutes that a run may take, as a number; what it does instead of these is not asked for, too."""
    if minutes is None:
        return None
    number = isinstance(minutes, (int, float)) and not isinstance(minutes, bool) and 0 < minutes < math.inf
    check("quantize", "minutes", minutes, "a number > 0", number)
    alone = effort is None and recipe is None and steps is None
    check("quantize", "minutes", minutes, "given without effort, recipe and steps", alone)
    return float(minutes)


def recipe_asked(owner: str, recipe: Any, steps: int | None, objective: Objective) -> tuple[Recipe, int]:
    """The recipe, and its student steps or those that were asked for.

    Generators of a named recipe are asked for no labels where images have none.
    """
    check(owner, "recipe", recipe, "a name or a Recipe", isinstance(recipe, (str, Recipe)))
    if isinstance(recipe, str):
        recipe = recipe_named(recipe, owner)
        if objective.num_classes is None:
            recipe = replace(recipe, generators=tuple(replace(item, conditional=False) for item in recipe.generators))
    if "distilled" not in recipe.rungs:
        rule = f"left out with recipe {recipe.name}, which trains no whole network"
        check(owner, "steps", steps, rule, steps is None)
        return recipe, 0
    return recipe, recipe.steps if steps is None else integer(owner, "steps", steps, 1)


def real_images(owner: str, images: Any, shape: tuple[int, int, int], recipe: Recipe) -> Tensor | None:
    """A user's own images, as the network takes them."""
    check(owner, "recipe", recipe.name, "one with generators, or images given", bool(recipe.generators)
          or recipe.rungs == ("analytic",) or images is not None)  # fmt: skip
    if images is None:
        return None
    learns = recipe.rungs != ("analytic",)
    check(owner, "recipe", recipe.name, "one that looks at images, where some are given", learns)
    if isinstance(images, Images):
        images = images.normalize(images.pixels)
    rule = f"dfq.data.Images, or a tensor of normalised images [N, {', '.join(map(str, shape))}], at least one"
    fits = isinstance(images, Tensor) and images.is_floating_point() and images.shape[1:] == shape and len(images) > 0
    got = f"{images.dtype} {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
    check(owner, "images", got, rule, fits)
    check(owner, "images", "NaN or infinity", "finite", bool(torch.isfinite(images).all()))
    return images.detach().float().cpu()


def pixel_bounds(normalization: Normalization | None) -> tuple[Tensor, Tensor] | None:
    """What black and white are to a network, `[C]` each, where it is known what pixels mean to it."""
    if normalization is None:
        return None
    mean, std = (torch.tensor(part) for part in normalization)
    return -mean / std, (1 - mean) / std


def check_processes(owner: str, config: QuantConfig | None, recipe: Recipe) -> None:
    """Several processes train quantized students whose batch norms stay as they are, in shares of one size."""
    count = ranks.world()
    if count == 1:
        return
    rule = "one, for networks whose batch norms learn from whole batches"
    check(owner, "the number of processes", count, rule, config is not None and config.batch_norm == "frozen")
    sizes = {"recipe's batch_size": recipe.batch_size, "recipe's fit.batch_size": recipe.fit.batch_size}
    ranks.check_shares(owner, sizes)


def check_metric(owner: str, metric: Any, teacher: nn.Module) -> None:
    """Judges the teacher once: a metric that fails must not fail after the run."""
    if metric is None:
        return
    check(owner, "metric", type(metric).__name__, "a function of a network", callable(metric))
    score(owner, metric, teacher)


@torch.no_grad()
def score(owner: str, metric: Metric, network: Callable[[Tensor], Any]) -> float:
    """The number that a user's function gives a network, whose images and results are on the CPU wherever it is."""
    if isinstance(network, nn.Module):
        device = next((tensor.device for tensor in network.parameters()), torch.device("cpu"))

        def there(images: Tensor) -> Any:
            return pytree.tree_map_only(Tensor, Tensor.cpu, network(images.to(device)))

        with evaluation(network):
            value = metric(there)
    else:
        value = metric(network)
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{owner}: metric must return a number, got {type(value).__name__}") from error
