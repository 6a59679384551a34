"""What a classifier must be: fp32, images in, logits out."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dfq.errors import first_line
from dfq_kernels import BackendError


@contextmanager
def evaluation(model: nn.Module) -> Iterator[nn.Module]:
    """`model` in evaluation mode; every module gets its own mode back, whatever happens."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield model.eval()
    finally:
        for module, mode in modes:
            module.training = mode


def check_weights(model: nn.Module, *, owner: str, name: str) -> nn.Module:
    """`model`, if its parameters and buffers are there and fp32; else a `ValueError`."""
    for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta:
            raise ValueError(f"{owner}: {name} must hold its weights, got {key} on the meta device")
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise ValueError(f"{owner}: {name} must be float32 (model.float()), got {key} of {tensor.dtype}")
    return model


@torch.no_grad()
def check_classifier(
    model: nn.Module,
    input_shape: tuple[int, ...],
    num_classes: int,
    *,
    device: torch.device,
    owner: str,
    name: str,
) -> Tensor:
    """Runs `model` on two empty images, in evaluation mode.

    Returns:
        Its logits `[2, num_classes]`.

    Raises:
        ValueError: it fails on images of `input_shape`, or gives something else than logits.
    """
    with evaluation(model):
        return _logits(model, input_shape, num_classes, device, owner, name)


@torch.no_grad()
def check_teacher(
    model: nn.Module, input_shape: tuple[int, ...], num_classes: int | None, *, device: torch.device, owner: str,
    name: str,
) -> int:  # fmt: skip
    """What a classifier must be before anything is learnt from it: as `check_classifier`, and finite.

    Args:
        num_classes: None: as many as it has logits.

    Returns:
        Its number of classes.
    """
    if num_classes is None:
        num_classes = _classes(model, input_shape, device, owner, name)
    logits = check_classifier(model, input_shape, num_classes, device=device, owner=owner, name=name)
    if not bool(torch.isfinite(logits).all()):
        raise ValueError(f"{owner}: {name} must have finite weights, got NaN or infinite logits")
    return num_classes


def _classes(model: nn.Module, input_shape: tuple[int, ...], device: torch.device, owner: str, name: str) -> int:
    with evaluation(model):
        logits = _run(model, input_shape, device, owner, name)
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != 2 or logits.shape[1] < 2:
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"{owner}: {name} must give logits [N, classes], got {shape}")
    return logits.shape[1]


def check_learns(
    model: nn.Module,
    input_shape: tuple[int, ...],
    num_classes: int,
    *,
    device: torch.device,
    owner: str,
    name: str,
) -> None:
    """Runs a copy of `model` in training mode: as `check_classifier`, and the logits must have a gradient."""
    logits = _logits(copy.deepcopy(model).train(), input_shape, num_classes, device, owner, name)
    if not logits.requires_grad:
        raise ValueError(f"{owner}: {name} must give logits with a gradient in training, got some without")


def _logits(
    model: nn.Module, input_shape: tuple[int, ...], num_classes: int, device: torch.device, owner: str, name: str
) -> Tensor:
    logits = _run(model, input_shape, device, owner, name)
    if not isinstance(logits, Tensor) or logits.shape != (2, num_classes):
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"{owner}: {name} must give logits [N, num_classes={num_classes}], got {shape}")
    return logits


def _run(model: nn.Module, input_shape: tuple[int, ...], device: torch.device, owner: str, name: str) -> object:
    try:
        result: object = model(torch.zeros(2, *input_shape, device=device))
        return result
    except (torch.OutOfMemoryError, BackendError):
        raise
    except Exception as error:  # whatever the model's own code raises
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ValueError(f"{owner}: {name} must accept images of {tuple(input_shape)}, got {reason}") from error
