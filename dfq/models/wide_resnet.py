"""Wide residual networks WRN-D-K. Source: Zagoruyko and Komodakis 2016, arXiv 1605.07146."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from dfq.models.stem import conv_stem


class PreActivationBlock(nn.Module):
    """`conv(relu(bn(conv(relu(bn(x)))))) + shortcut`; the shortcut is `x`, or a 1x1 convolution of `relu(bn(x))`."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.shortcut: nn.Module | None = None
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        residual = x if self.shortcut is None else self.shortcut(out)
        out = F.relu(self.bn2(self.conv1(out)))
        return self.conv2(out) + residual


class WideResNet(nn.Module):
    """WRN-D-K for `[N, in_channels, H, W]` images; `D = 6 n + 4` convolutions, widths 16 K, 32 K, 64 K."""

    def __init__(self, depth: int, width: int, *, in_channels: int, num_classes: int, stem: str) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"build_model: depth of wrn-D-K must be 6 n + 4 with n >= 1, got {depth}")
        if width < 1:
            raise ValueError(f"build_model: width of wrn-D-K must be at least 1, got {width}")
        blocks_per_stage = (depth - 4) // 6
        self.stem = conv_stem(in_channels, 16, stem, normalize=False)
        blocks: list[nn.Module] = []
        channels = 16
        for stage, stage_channels in enumerate((16 * width, 32 * width, 64 * width)):
            for index in range(blocks_per_stage):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(PreActivationBlock(channels, stage_channels, stride))
                channels = stage_channels
        self.blocks = nn.Sequential(*blocks)
        self.bn = nn.BatchNorm2d(channels)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn(self.blocks(self.stem(x))))
        return self.fc(self.pool(out).flatten(1))
