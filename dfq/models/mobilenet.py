"""MobileNets. Sources: Howard et al. 2017, arXiv 1704.04861 (v1); Sandler et al. 2018, arXiv 1801.04381 (v2)."""

from __future__ import annotations

from torch import Tensor, nn

from dfq.models.stem import STEMS

V1_BLOCKS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1))
# (expansion, channels, blocks, stride): table 2 of the v2 paper
V2_STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


def conv_bn(
    in_channels: int, out_channels: int, kernel: int, stride: int = 1, *, groups: int = 1, act: type[nn.Module] | None
) -> nn.Sequential:
    """Convolution with "same" padding, BN and, if given, an activation."""
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), *([act()] if act else []))


class InvertedResidual(nn.Module):
    """Expansion 1x1, depthwise 3x3, linear projection 1x1; a shortcut where shape allows."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = in_channels * expansion
        layers: list[nn.Module] = [conv_bn(in_channels, hidden, 1, act=nn.ReLU6)] if expansion != 1 else []
        layers.append(conv_bn(hidden, hidden, 3, stride, groups=hidden, act=nn.ReLU6))
        layers.append(conv_bn(hidden, out_channels, 1, act=None))
        self.layers = nn.Sequential(*layers)
        self.has_shortcut = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        out = self.layers(x)
        return out + x if self.has_shortcut else out


class MobileNet(nn.Module):
    """`cifar` stem: the first three strides of 2 become 1, so that 32x32 images end at 8x8 (v1, v2) maps."""

    def __init__(self, version: int, *, in_channels: int, num_classes: int, stem: str) -> None:
        super().__init__()
        if stem not in STEMS:
            raise ValueError(f"build_model: stem must be one of {', '.join(STEMS)}, got {stem!r}")
        unstrided = 3 if stem == "cifar" else 0
        act: type[nn.Module] = nn.ReLU if version == 1 else nn.ReLU6

        def stride_of(stride: int) -> int:
            nonlocal unstrided
            if stride == 2 and unstrided > 0:
                unstrided -= 1
                return 1
            return stride

        layers: list[nn.Module] = [conv_bn(in_channels, 32, 3, stride_of(2), act=act)]
        channels = 32
        if version == 1:
            for out_channels, stride in V1_BLOCKS:
                layers.append(conv_bn(channels, channels, 3, stride_of(stride), groups=channels, act=act))
                layers.append(conv_bn(channels, out_channels, 1, act=act))
                channels = out_channels
        else:
            for expansion, out_channels, count, stride in V2_STAGES:
                for index in range(count):
                    block_stride = stride_of(stride) if index == 0 else 1
                    layers.append(InvertedResidual(channels, out_channels, block_stride, expansion))
                    channels = out_channels
            layers.append(conv_bn(channels, 1280, 1, act=act))
            channels = 1280
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pool(self.features(x)).flatten(1))
