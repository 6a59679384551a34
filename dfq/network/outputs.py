"""What a network must be before anything is learnt from it: fp32, images in, tensors with a row for each image out."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dfq.errors import first_line
from dfq_kernels import BackendError

Shapes = Sequence[tuple[int, ...]]
"""Of every output, for one image."""


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
def outputs_of(
    model: nn.Module, input_shape: tuple[int, ...], *, device: torch.device, owner: str, name: str
) -> list[Tensor]:
    """What `model` returns for two empty images, in evaluation mode: its tensors, in the order of their nesting.

    Raises:
        ValueError: it fails on images of `input_shape`, gives no tensor or one without a row for each image, or
            something that is not finite.
    """
    with evaluation(model):
        outputs = _outputs(model, input_shape, device, owner, name)
    if not all(bool(torch.isfinite(output).all()) for output in outputs):
        raise ValueError(f"{owner}: {name} must have finite weights, got NaN or infinite outputs")
    return outputs


@torch.no_grad()
def check_outputs(
    model: nn.Module, input_shape: tuple[int, ...], shapes: Shapes, *, device: torch.device, owner: str, name: str
) -> None:
    """Runs `model` on two empty images, in evaluation mode.

    Args:
        shapes: what it must give.

    Raises:
        ValueError: it fails on images of `input_shape`, or gives something else.
    """
    with evaluation(model):
        _check_shapes(_outputs(model, input_shape, device, owner, name), shapes, owner, name)


def check_learns(
    model: nn.Module, input_shape: tuple[int, ...], shapes: Shapes, *, device: torch.device, owner: str, name: str
) -> None:
    """Runs a copy of `model` in training mode: as `check_outputs`, and the outputs must have a gradient."""
    outputs = _outputs(copy.deepcopy(model).train(), input_shape, device, owner, name)
    _check_shapes(outputs, shapes, owner, name)
    if not all(output.requires_grad for output in outputs):
        raise ValueError(f"{owner}: {name} must give {wording(shapes)} with a gradient in training, got some without")


def wording(shapes: Shapes) -> str:
    """`logits [N, num_classes=10]`, or `outputs [N, 64] [N, 3, 32, 32]`."""
    if len(shapes) == 1 and len(shapes[0]) == 1:
        return f"logits [N, num_classes={shapes[0][0]}]"
    return "outputs " + " ".join(f"[{', '.join(['N', *map(str, shape)])}]" for shape in shapes)


def _check_shapes(outputs: list[Tensor], shapes: Shapes, owner: str, name: str) -> None:
    found = [tuple(output.shape) for output in outputs]
    if found != [(2, *shape) for shape in shapes]:
        got = " ".join(map(str, found))
        raise ValueError(f"{owner}: {name} must give {wording(shapes)}, got {got}")


def _outputs(
    model: nn.Module, input_shape: tuple[int, ...], device: torch.device, owner: str, name: str
) -> list[Tensor]:
    try:
        result = model(torch.zeros(2, *input_shape, device=device))
    except (torch.OutOfMemoryError, BackendError):
        raise
    except Exception as error:  # whatever the model's own code raises
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ValueError(f"{owner}: {name} must accept images of {tuple(input_shape)}, got {reason}") from error
    leaves = pytree.tree_leaves(result)
    rule = "tensors of floating point with a row for each image"
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            raise ValueError(f"{owner}: {name} must give {rule}, got {type(leaf).__name__}")
        if not leaf.is_floating_point() or leaf.dim() == 0 or len(leaf) != 2:
            raise ValueError(f"{owner}: {name} must give {rule}, got {leaf.dtype} {tuple(leaf.shape)} for two images")
    if not leaves:
        raise ValueError(f"{owner}: {name} must give {rule}, got none")
    return leaves
