"""The first layers of a classifier: a 3x3 convolution for small images, a strided 7x7 one for ImageNet sizes."""

from __future__ import annotations

from torch import nn

STEMS = ("cifar", "imagenet")


def conv_stem(in_channels: int, channels: int, stem: str, *, normalize: bool = True) -> nn.Sequential:
    """`cifar`: 3x3 stride 1; `imagenet`: 7x7 stride 2 and 3x3 max pooling stride 2. With BN and ReLU if `normalize`."""
    if stem not in STEMS:
        raise ValueError(f"build_model: stem must be one of {', '.join(STEMS)}, got {stem!r}")
    if stem == "cifar":
        layers: list[nn.Module] = [nn.Conv2d(in_channels, channels, 3, 1, 1, bias=False)]
    else:
        layers = [nn.Conv2d(in_channels, channels, 7, 2, 3, bias=False)]
    if normalize:
        layers += [nn.BatchNorm2d(channels), nn.ReLU()]
    if stem == "imagenet":
        layers += [nn.MaxPool2d(3, 2, 1)]
    return nn.Sequential(*layers)
