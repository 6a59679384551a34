"""Accuracy by the exact forward: what every table of this project reports."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from dfq.data.images import Images
from dfq.errors import first_line
from dfq.network.outputs import evaluation


@torch.no_grad()
def accuracy(
    model: nn.Module | Callable[[Tensor], Tensor], images: Images, *, device: torch.device, batch_size: int = 250
) -> float:
    """Share of images, in percent, whose largest logit is their label's.

    A model of `dfq.prepare` runs its exact forward: convolutions on integer-valued tensors, fp32 constants. A float
    model runs in fp32; an integer engine in integers.

    Args:
        model: makes logits `[N, classes]` of normalised images; a module is evaluated and gets its own mode back.
        images: what to judge by, with labels.
        device: where the model is.
        batch_size: images in one call.

    Raises:
        ValueError: no images, images of another channel count than the model takes, or other classes.
    """
    if len(images) == 0:
        raise ValueError("evaluate: images must hold at least one, got none")
    correct = 0
    with evaluation(model) if isinstance(model, nn.Module) else nullcontext():
        for start in range(0, len(images), batch_size):
            pixels = images.pixels[start : start + batch_size].to(device)
            labels = images.labels[start : start + batch_size].to(device)
            try:
                logits = model(images.normalize(pixels).contiguous(memory_format=torch.channels_last))
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise ValueError(
                    f"evaluate: images must be what the model takes, got {images.input_shape}: {first_line(error)}"
                ) from error
            if logits.shape[1] < images.num_classes:
                raise ValueError(
                    f"evaluate: model must have {images.num_classes} classes or more, got {logits.shape[1]}"
                )
            correct += int((logits.argmax(1) == labels).sum())
    return 100.0 * correct / len(images)


def check_test_images(images: Images | None, input_shape: tuple[int, ...], num_classes: int | None, owner: str) -> None:
    """What `accuracy` would find after hours of training, before it.

    Raises:
        ValueError: not `Images`, none of them, another shape than the model's, or more classes.
    """
    if images is None:
        return
    if not isinstance(images, Images):
        raise ValueError(f"{owner}: test_images must be dfq.data.Images, got {type(images).__name__}")
    if len(images) == 0:
        raise ValueError(f"{owner}: test_images must hold at least one image, got none")
    if images.input_shape != tuple(input_shape):
        raise ValueError(
            f"{owner}: test_images must have the model's image shape {tuple(input_shape)}, got {images.input_shape}"
        )
    if num_classes is None:
        raise ValueError(f"{owner}: the network must be a classifier for test_images, got one with other outputs")
    if images.num_classes > num_classes:
        raise ValueError(
            f"{owner}: test_images must have at most the model's {num_classes} classes, got {images.num_classes}"
        )
