"""VGG-11 with batch norm. Source: Simonyan and Zisserman 2014, arXiv 1409.1556 (column A); one linear layer on top."""

from __future__ import annotations

from torch import Tensor, nn

from dfq.models.stem import STEMS

COLUMN_A = (64, "pool", 128, "pool", 256, 256, "pool", 512, 512, "pool", 512, 512)


class VGG(nn.Module):
    """Convolution, BN, ReLU; 2x2 max pooling between stages (`imagenet`: one more before the head)."""

    def __init__(self, *, in_channels: int, num_classes: int, stem: str) -> None:
        super().__init__()
        if stem not in STEMS:
            raise ValueError(f"build_model: stem must be one of {', '.join(STEMS)}, got {stem!r}")
        layers: list[nn.Module] = []
        channels = in_channels
        for item in COLUMN_A:
            if isinstance(item, str):
                layers.append(nn.MaxPool2d(2, 2))
            else:
                layers += [nn.Conv2d(channels, item, 3, 1, 1, bias=False), nn.BatchNorm2d(item), nn.ReLU()]
                channels = item
        if stem == "imagenet":
            layers.append(nn.MaxPool2d(2, 2))
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pool(self.features(x)).flatten(1))
