"""What options name: networks and how they are built, bits, real images, functions."""

from __future__ import annotations

import importlib
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dfq.arguments import Metric, objective_asked
from dfq.config import LayerBits
from dfq.data.images import Images, Normalization, check_normalization, load_images
from dfq.deploy import images_of
from dfq.engine.pixels import normalized
from dfq.errors import check, first_line
from dfq.models import ModelSpec, build_model, embedded
from dfq.models.registry import ZOOS
from dfq.running.checkpoint import load_weights


def named_network(
    model: str | None,
    weights: Path | None,
    model_kwargs: str | None,
    stem: str | None,
    input_shape: str | None,
    num_classes: int | None,
    data: str | None,
    data_root: Path | None,
) -> tuple[nn.Module, ModelSpec, tuple[int, int, int], int | None, Images | None]:
    """The trained network, how it is built, its image shape, its classes if it has any, and test images if any."""
    if model is None:
        options = {"weights": weights, "model_kwargs": model_kwargs, "stem": stem, "input_shape": input_shape,
                   "num_classes": num_classes}  # fmt: skip
        if given := [name for name, value in options.items() if value is not None]:
            raise ValueError(f"dfq: model must be given with {given[0]}, got none")
        images = load_images(data or embedded.DATASET, "test", data_root)
        return embedded.load_teacher(), embedded.SPEC, embedded.INPUT_SHAPE, images.num_classes, images
    test = None if data is None else load_images(data, "test", data_root)
    shape = test.input_shape if input_shape is None and test is not None else _shape(input_shape)
    classes = num_classes if num_classes is not None else test.num_classes if test is not None else None
    if classes is None and ":" not in model:
        raise ValueError(f"dfq: num_classes must be given for the named model {model}, or --data, got neither")
    if weights is None and (":" not in model or (model.partition(":")[0] in ZOOS and model_kwargs is None)):
        raise ValueError(f"dfq: weights must be given for the named model {model}, got none")
    (spec,) = named_specs([model], shape[0], classes or ModelSpec.num_classes, stem, model_kwargs)
    network = build_model(spec)
    if weights is not None:
        load_weights(network, weights)
    if classes is None:
        meaning = objective_asked("dfq", f"model {model}", network, shape, None, None, torch.device("cpu"))
        classes = meaning.num_classes
        spec = replace(spec, num_classes=classes or ModelSpec.num_classes)
    return network.eval(), spec, shape, classes, test


def named_specs(
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


def layer_bits_of(items: list[str]) -> dict[str, LayerBits]:
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


def real_images_of(
    path: Path | None, shape: tuple[int, int, int], said: Normalization | None, test: Images | None
) -> Tensor | None:
    """Images to look at, of a folder, a picture or a NumPy file, as the network takes them."""
    if path is None:
        return None
    known = check_normalization("dfq", said, shape[0], test)
    rule = "given with --mean and --std, or --data: what pixels mean to the network"
    if known is None and path.suffix != ".npy":
        raise ValueError(f"dfq: images must be {rule}, got {path}")
    check("dfq", "images", str(path), "a file or a folder that is there", path.exists())

    def of_pixels(pixels: Tensor) -> Tensor:
        check("dfq", "images", str(path), rule, known is not None)
        return normalized(pixels, known)  # type: ignore[arg-type]

    return images_of(path, shape, of_pixels, owner="dfq")


def objective_words(text: str | None) -> str | list[str] | None:
    """`classes`, or one word for each output: `classes,values`."""
    return text.split(",") if text is not None and "," in text else text


def metric_named(name: str | None) -> Metric | None:
    """The function `package.module:function`."""
    if name is None:
        return None
    module, _, attribute = name.partition(":")
    rule = "an importable package.module:function"
    check("dfq", "metric", name, rule, bool(module and attribute))
    try:
        found: Metric = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # whatever the user's module raises
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ValueError(f"dfq: metric must be {rule}, got {name!r} ({reason})") from error
    return found


def bytes_of(text: str | None) -> int | None:
    """A size: `300kB`, `1.5MB`, `4096`; kB and MB are thousands and millions."""
    if text is None:
        return None
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?(B|kB|MB)?", text)
    if match is None:
        raise ValueError(f"dfq: size must be a number of bytes, kB or MB, as in 300kB, got {text!r}")
    return round(float(match[1]) * {"B": 1, "kB": 1000, "MB": 10**6}[match[2] or "B"])
