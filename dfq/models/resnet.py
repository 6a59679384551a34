"""Residual networks. Source: He et al. 2015, arXiv 1512.03385 (ResNet-18/34: table 1; ResNet-20: section 4.2)."""

from __future__ import annotations

from torch import Tensor, nn

from dfq.models.stem import conv_stem


class BasicBlock(nn.Module):
    """`relu(bn(conv(relu(bn(conv(x))))) + shortcut(x))`."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU()
        self.shortcut: nn.Module | None = None
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        residual = x if self.shortcut is None else self.shortcut(x)
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)) + residual)


class ResNet(nn.Module):
    """Stages of `BasicBlock`, the first at stride 1 and each later one at stride 2."""

    def __init__(
        self,
        blocks_per_stage: tuple[int, ...],
        stage_channels: tuple[int, ...],
        *,
        in_channels: int,
        num_classes: int,
        stem: str,
    ) -> None:
        super().__init__()
        channels = stage_channels[0]
        self.stem = conv_stem(in_channels, channels, stem)
        blocks: list[nn.Module] = []
        for stage, (count, out_channels) in enumerate(zip(blocks_per_stage, stage_channels, strict=True)):
            for index in range(count):
                blocks.append(BasicBlock(channels, out_channels, 2 if stage > 0 and index == 0 else 1))
                channels = out_channels
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pool(self.blocks(self.stem(x))).flatten(1))
