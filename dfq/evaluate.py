"""Accuracy by the exact forward: what every table of this project reports."""

from __future__ import annotations

import torch
from torch import nn

from dfq.data import Images


@torch.no_grad()
def accuracy(model: nn.Module, images: Images, *, device: torch.device, batch_size: int = 250) -> float:
    """Share of images, in percent, whose largest logit is their label's.

    A model of `dfq.quant.prepare` runs its exact forward (`numerics`): convolutions on integer-valued tensors, fp32
    constants. A float model runs in fp32.

    Raises:
        ValueError: images of another channel count than the model takes, or other classes.
    """
    was_training = model.training
    model.eval()
    correct = 0
    for start in range(0, len(images), batch_size):
        pixels = images.pixels[start : start + batch_size].to(device)
        labels = images.labels[start : start + batch_size].to(device)
        try:
            logits = model(images.normalize(pixels).contiguous(memory_format=torch.channels_last))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"evaluate: images must be what the model takes, got {images.input_shape}: {reason}"
            ) from error
        if logits.shape[1] < images.num_classes:
            raise ValueError(f"evaluate: model must have {images.num_classes} classes or more, got {logits.shape[1]}")
        correct += int((logits.argmax(1) == labels).sum())
    model.train(was_training)
    return 100.0 * correct / len(images)
