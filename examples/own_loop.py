"""Quantization-aware training in a loop of one's own: `prepare`, any optimizer and loss, `calibrate`, integers.

A small residual network in the style of torchvision learns Fashion-MNIST from 8,000 of the test images that dfq
carries, in floating point; then it learns on as a 4-bit network, by the same ordinary loop, which knows nothing of
bits; then it becomes integers. Judged on the other 2,000 images. About a minute on one core; no other package.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from measure import write
from torch import Tensor, nn
from torch.nn import functional as F

import dfq
from dfq.data.images import load_images

TRAINED, BATCH = 8000, 128


class Block(nn.Module):
    """torchvision's BasicBlock."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.downsample = None
        if stride != 1 or channels != out:
            self.downsample = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


def network() -> nn.Module:
    """A ResNet of three blocks for 32x32 grey images."""
    stem = [nn.Conv2d(1, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True)]
    blocks = [Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def batches(images: Tensor, labels: Tensor, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(epoch))
    for part in order.split(BATCH):
        yield images[part], labels[part]


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int, rate: float) -> None:
    """Somebody's own loop: it would be the same for any network."""
    steps = epochs * -(-len(images) // BATCH)
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for epoch in range(epochs):
        for some, wanted in batches(images, labels, epoch):
            optimizer.zero_grad()
            F.cross_entropy(model(some), wanted).backward()
            optimizer.step()
            schedule.step()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module | dfq.engine.Engine, images: Tensor, labels: Tensor) -> float:
    return round(100 * (model(images).argmax(1) == labels).float().mean().item(), 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the facts to this file")
    parser.add_argument("--epochs", type=int, default=4, help="of the float network; the 4-bit one gets half")
    options = parser.parse_args()
    torch.manual_seed(0)
    began = time.perf_counter()
    data = load_images("fashion-mnist", "test")
    images, labels = data.normalize(data.pixels), data.labels
    seen, known, others, right = images[:TRAINED], labels[:TRAINED], images[TRAINED:], labels[TRAINED:]

    model = network()
    train(model, seen, known, options.epochs, rate=0.1)
    facts: dict[str, object] = {"network": "residual network, trained in a loop of its own", "preset": "W4A4"}
    facts["top1_float"] = accuracy(model, others, right)

    # batch norms keep their statistics unless they are told to train; a loop with a rate of this size needs them to
    config = replace(dfq.quant_config("W4A4"), batch_norm="train")
    student = dfq.prepare(copy.deepcopy(model), (1, 32, 32), config=config)
    dfq.calibrate(student, [seen[:512]])
    facts["top1_calibrated"] = accuracy(student.eval(), others, right)

    student = dfq.prepare(model, (1, 32, 32), config=config)  # ranges follow the batches until calibrate fixes them
    train(student, seen, known, max(1, options.epochs // 2), rate=0.02)
    dfq.calibrate(student, [seen[:512]])
    facts["top1_trained"] = accuracy(student.eval(), others, right)

    engine = dfq.export_integers(student, normalization=(data.mean, data.std))
    facts["top1_integers"] = accuracy(engine, others, right)
    with torch.no_grad():
        facts["bit_equal"] = torch.equal(engine(others), student(others))
    facts["seconds"] = round(time.perf_counter() - began, 1)
    for name, value in facts.items():
        print(f"{name.replace('_', ' ')}: {value}")
    if options.json is not None:
        write(options.json, [facts])


if __name__ == "__main__":
    main()
