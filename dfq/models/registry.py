"""Models by name. A `ModelSpec` is plain data and goes into every run's config and checkpoint."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn

from dfq.models.mobilenet import MobileNet
from dfq.models.resnet import ResNet
from dfq.models.vgg import VGG
from dfq.models.wide_resnet import WideResNet

MODEL_NAMES = ("wrn-D-K", "resnet18", "resnet34", "resnet20", "vgg11", "mobilenet-v1", "mobilenet-v2")
_RESNETS = {
    "resnet18": ((2, 2, 2, 2), (64, 128, 256, 512)),
    "resnet34": ((3, 4, 6, 3), (64, 128, 256, 512)),
    "resnet20": ((3, 3, 3), (16, 32, 64)),
}


@dataclass(frozen=True)
class ModelSpec:
    """What is needed to build a classifier again.

    Args:
        name: a name of `MODEL_NAMES` (`wrn-16-1` for D=16, K=1), `timm:name`, `torchvision:name`, or
            `package.module:factory`.
        in_channels: channels of the images, at least 1.
        num_classes: number of logits, at least 2.
        stem: `cifar` (stride 1) or `imagenet` (stride 4); not used by a factory.
        kwargs: keyword arguments of a factory, JSON values only; not used by named models.
    """

    name: str = "wrn-16-1"
    in_channels: int = 1
    num_classes: int = 10
    stem: str = "cifar"
    kwargs: dict[str, Any] = field(default_factory=dict)


def build_model(spec: ModelSpec) -> nn.Module:
    """Builds the freshly initialised network of `spec`.

    Raises:
        ValueError: an unknown name, a factory that cannot be imported, sizes out of range.
    """
    if spec.in_channels < 1:
        raise ValueError(f"build_model: in_channels must be at least 1, got {spec.in_channels}")
    if spec.num_classes < 2:
        raise ValueError(f"build_model: num_classes must be at least 2, got {spec.num_classes}")
    sizes: dict[str, Any] = {"in_channels": spec.in_channels, "num_classes": spec.num_classes, "stem": spec.stem}
    if ":" in spec.name:
        return _from_factory(spec)
    if match := re.fullmatch(r"wrn-(\d+)-(\d+)", spec.name):
        return WideResNet(int(match[1]), int(match[2]), **sizes)
    if spec.name in _RESNETS:
        blocks, channels = _RESNETS[spec.name]
        return ResNet(blocks, channels, **sizes)
    if spec.name == "vgg11":
        return VGG(**sizes)
    if spec.name in ("mobilenet-v1", "mobilenet-v2"):
        return MobileNet(int(spec.name[-1]), **sizes)
    known = ", ".join(MODEL_NAMES)
    rule = f"one of {known}, timm:NAME, torchvision:NAME or package.module:factory"
    raise ValueError(f"build_model: name must be {rule}, got {spec.name!r}")


def _of_timm(name: str) -> Callable[..., Any]:
    return partial(importlib.import_module("timm").create_model, name)


def _of_torchvision(name: str) -> Callable[..., Any]:
    models = importlib.import_module("torchvision.models")
    models.get_model_builder(name)  # a wrong name is refused with a list of the right ones
    return partial(models.get_model, name)


ZOOS: dict[str, Callable[[str], Callable[..., Any]]] = {"timm": _of_timm, "torchvision": _of_torchvision}
"""Packages that have networks by name; neither is needed for anything else."""


def _from_factory(spec: ModelSpec) -> nn.Module:
    module_name, _, attribute = spec.name.partition(":")
    try:
        named = ZOOS.get(module_name)
        factory = named(attribute) if named else getattr(importlib.import_module(module_name), attribute)
    except Exception as error:  # whatever the user's module raises
        raise ValueError(
            f"build_model: name must be an importable package.module:factory, got {spec.name!r} "
            f"({type(error).__name__}: {error})"
        ) from error
    try:
        model = factory(**spec.kwargs)
    except Exception as error:
        given = spec.kwargs or "no arguments"
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"build_model: {spec.name} must accept {given}, got {reason}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"build_model: {spec.name} must return a torch.nn.Module, got {type(model).__name__}")
    return model
