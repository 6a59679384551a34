"""Noise to images, in the teacher's normalised input space."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

STAGES = 3


def upsample_conv2d(x: Tensor, weight: Tensor) -> Tensor:
    """`F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, padding=1)` in 4/9 of its products.

    Of the 3x3 upsampled pixels that an output sees, two in each direction are copies of one: their taps are summed
    first, and what is left is a transposed convolution of stride 2 with 4x4 taps `[w2, w1 + w2, w0 + w1, w0]` each way.

    Args:
        x: `[N, C, H, W]`.
        weight: `[K, C, 3, 3]`.

    Returns:
        `[N, K, 2 H, 2 W]`, with other rounding than the two calls.
    """
    taps = F.pad(weight.flip(2, 3), (1, 1, 1, 1))
    taps = taps[:, :, 1:] + taps[:, :, :-1]
    taps = taps[:, :, :, 1:] + taps[:, :, :, :-1]
    return F.conv_transpose2d(x, taps.transpose(0, 1).contiguous(memory_format=torch.channels_last), None, 2, 1)


class Generator(nn.Module):
    """Linear to a small map, three times nearest upsampling with convolution, BN and ReLU, a convolution to images.

    `[N, noise]` (and labels `[N]`, if `num_classes`) to `[N, C, H, W]` with one mean and deviation for each channel.
    Batch norms use the batch's statistics always; nothing is stored. Channels: width, width/2, width/4, width/8.

    Args:
        image_shape: `(C, H, W)`, any size.
        noise: length of the noise vector.
        width: channels of the first map, a multiple of 8.
        num_classes: 0, or the number of labels that images can be asked for.
        mean: of every channel of the images, `[C]`; None: 0.
        deviation: of all channels.
        bounds: what black and white are to the network, `[C]` each; images stay between them. None: they are not known.
    """

    mean: Tensor
    deviation: Tensor
    low: Tensor
    high: Tensor

    def __init__(
        self, image_shape: tuple[int, int, int], *, noise: int, width: int, num_classes: int = 0,
        mean: Tensor | None = None, deviation: float = 1.0, bounds: tuple[Tensor, Tensor] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if width < 8 or width % 8:
            raise ValueError(f"Generator: width must be a positive multiple of 8, got {width}")
        self.image_shape, self.noise, self.width, self.num_classes = image_shape, noise, width, num_classes
        self.start = tuple(math.ceil(size / 2**STAGES) for size in image_shape[1:])
        self.project = nn.Linear(noise + num_classes, width * self.start[0] * self.start[1])
        channels = [width >> stage for stage in range(STAGES + 1)]
        self.convs = nn.ModuleList(
            nn.Conv2d(before, after, 3, 1, 1, bias=False) for before, after in pairwise(channels)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(after, track_running_stats=False) for after in channels[1:])
        self.to_image = nn.Conv2d(channels[-1], image_shape[0], 3, 1, 1)
        self.normalize = nn.BatchNorm2d(image_shape[0], affine=False, track_running_stats=False)
        mean = torch.zeros(image_shape[0]) if mean is None else mean
        self.register_buffer("mean", mean.detach().clone().view(-1, 1, 1))
        self.register_buffer("deviation", torch.tensor(deviation))
        self.bounded = bounds is not None
        for name, value in zip(("low", "high"), bounds or (), strict=False):
            self.register_buffer(name, value.detach().clone().view(-1, 1, 1))

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        if labels is not None:
            classes = torch.arange(self.num_classes, device=labels.device)
            one_hot = (labels[:, None] == classes).to(z.dtype)  # F.one_hot reads the labels
            z = torch.cat([z, self.noise**0.5 * one_hot], dim=1)  # as long as the noise, or it would drown in it
        x = self.project(z).view(-1, self.width, *self.start).contiguous(memory_format=torch.channels_last)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.relu(norm(upsample_conv2d(x, conv.get_parameter("weight"))))
        _, height, width = self.image_shape
        images = torch.tanh(self.to_image(x).float())[:, :, :height, :width]
        images = self.mean + self.deviation * self.normalize(images)
        return images.clamp(self.low, self.high) if self.bounded else images
