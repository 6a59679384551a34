"""Three networks that are no classifiers of whole images, quantized without data: a U-Net, an embedding, a detector.

Each is made and trained here on Fashion-MNIST's garments, then handed to `dfq.quantize` as anybody's network would be:
the network, the shape of its images, a function that judges it. No image is given.

    python examples/heads.py [--network unet|embedding|detector] [--presets W8A8,W4A8] [--effort full] [--json FILE]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measure import write
from torch import Tensor, nn
from torch.nn import functional as F

import dfq
from dfq.data.images import load_images

CANVAS, GARMENT = 48, 28
CLASSES = 10
JUDGED = 2000
Network = Callable[[Tensor], Any]


def block(before: int, after: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU())


class UNet(nn.Module):
    """A class for every pixel: background or one of ten garments."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.first = block(1, width)
        self.down = nn.ModuleList(block(width << level, width << level + 1, 2) for level in range(3))
        self.up = nn.ModuleList(block(3 * width << level, width << level) for level in range(3))
        self.classes = nn.Conv2d(width, CLASSES + 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        seen = [self.first(x)]
        for down in self.down:
            seen.append(down(seen[-1]))
        x = seen.pop()
        for level in (2, 1, 0):
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
            x = self.up[level](torch.cat([x, seen.pop()], 1))
        return self.classes(x)


class Trunk(nn.Module):
    """What the embedding and the detector have in common."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            block(1, width), block(width, 2 * width, 2), block(2 * width, 2 * width), block(2 * width, 4 * width, 2),
            block(4 * width, 4 * width), block(4 * width, 8 * width, 2), block(8 * width, 8 * width),
        )  # fmt: skip


class Embedding(Trunk):
    """32 numbers of a garment; near to each other for garments of one kind."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(128, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.embed(self.blocks(x).mean((2, 3)))


class Detector(Trunk):
    """The class of the garment on a canvas, and its box: left, top, right, bottom, in shares of the canvas."""

    def __init__(self) -> None:
        super().__init__()
        self.kind, self.box = nn.Linear(128, CLASSES), nn.Linear(128 * 36, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.blocks(x)
        return {"kind": self.kind(x.amax((2, 3))), "box": self.box(x.flatten(1))}


@dataclass(frozen=True)
class Garments:
    """Pixels `[N, 28, 28]` in 0 to 1, and their kinds."""

    pixels: Tensor
    kinds: Tensor

    def scenes(self, count: int, each: int, random: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Canvases with `each` garments at random places, later ones in front.

        Returns:
            Images `[count, 1, 48, 48]`, a class for each pixel (0: background), the kind and box of the last garment.
        """
        images = torch.zeros(count, CANVAS, CANVAS)
        masks = torch.zeros(count, CANVAS, CANVAS, dtype=torch.int64)
        boxes, kinds = torch.zeros(count, 4), torch.zeros(count, dtype=torch.int64)
        chosen = torch.randint(len(self.pixels), (count, each), generator=random)
        places = torch.randint(CANVAS - GARMENT + 1, (count, each, 2), generator=random)
        for index in range(count):
            for row, (top, left) in zip(chosen[index].tolist(), places[index].tolist(), strict=True):
                garment = self.pixels[row]
                there = garment > 0.1
                window = (index, slice(top, top + GARMENT), slice(left, left + GARMENT))
                images[window] = torch.where(there, garment, images[window])
                masks[window] = torch.where(there, 1 + self.kinds[row], masks[window])
            rows, columns = there.any(1).nonzero()[:, 0], there.any(0).nonzero()[:, 0]
            ends = (left + columns[0], top + rows[0], left + columns[-1] + 1, top + rows[-1] + 1)
            boxes[index], kinds[index] = torch.tensor([float(end) for end in ends]) / CANVAS, self.kinds[row]
        return normalised(images[:, None]), masks, kinds, boxes


def normalised(pixels: Tensor) -> Tensor:
    return (pixels - 0.3) / 0.35


def garments(split: str) -> Garments:
    images = load_images("fashion-mnist", split)
    return Garments(images.pixels[:, 0, 2:-2, 2:-2].float() / 255, images.labels)


def train(
    model: nn.Module, loss: Callable[[torch.Generator], Tensor], steps: int, extra: tuple[Tensor, ...] = ()
) -> None:
    """Adam, one cycle; `loss` draws its own images."""
    random = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam([*model.parameters(), *extra], 3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss(random).backward()
        optimizer.step()
        schedule.step()
    model.eval()


def unet() -> tuple[nn.Module, dict[str, Any], Callable[[Network], float]]:
    """Judged by the mean over classes of intersection over union, in percent."""
    model, source = UNet(), garments("train")

    def loss(random: torch.Generator) -> Tensor:
        images, masks, _, _ = source.scenes(32, 3, random)
        return F.cross_entropy(model(images), masks)

    train(model, loss, 900)
    images, masks, _, _ = garments("test").scenes(500, 3, torch.Generator().manual_seed(1))

    def judge(network: Network) -> float:
        found = torch.cat([network(part).argmax(1) for part in images.split(100)])
        pairs = torch.bincount((masks * (CLASSES + 1) + found).flatten(), minlength=(CLASSES + 1) ** 2)
        table = pairs.view(CLASSES + 1, CLASSES + 1).double()
        both = table.diag()
        return float(100 * (both / (table.sum(0) + table.sum(1) - both)).mean())

    return model, {"input_shape": (1, CANVAS, CANVAS)}, judge


def embedding() -> tuple[nn.Module, dict[str, Any], Callable[[Network], float]]:
    """Judged by the share, in percent, of garments whose nearest other garment, by cosine, is of the same kind."""
    model, source = Embedding(), garments("train")
    proxies = torch.randn(CLASSES, 32, generator=torch.Generator().manual_seed(2)).requires_grad_(True)

    def loss(random: torch.Generator) -> Tensor:
        rows = torch.randint(len(source.pixels), (128,), generator=random)
        cosines = F.normalize(model(normalised(source.pixels[rows][:, None]))) @ F.normalize(proxies).T
        return F.cross_entropy(16 * cosines, source.kinds[rows])

    train(model, loss, 900, (proxies,))
    judged = garments("test")
    images, kinds = normalised(judged.pixels[:JUDGED, None]), judged.kinds[:JUDGED]

    def judge(network: Network) -> float:
        found = F.normalize(torch.cat([network(part) for part in images.split(250)]))
        cosines = (found @ found.T).fill_diagonal_(-1)
        return float(100 * (kinds[cosines.argmax(1)] == kinds).double().mean())

    return model, {"input_shape": (1, GARMENT, GARMENT), "objective": "values"}, judge


def detector() -> tuple[nn.Module, dict[str, Any], Callable[[Network], float]]:
    """Judged by the share, in percent, of garments with the right kind and a box that overlaps by two thirds (IoU)."""
    model, source = Detector(), garments("train")

    def loss(random: torch.Generator) -> Tensor:
        images, _, kinds, boxes = source.scenes(64, 1, random)
        found = model(images)
        return F.cross_entropy(found["kind"], kinds) + 10 * F.l1_loss(found["box"], boxes)

    train(model, loss, 900)
    images, _, kinds, boxes = garments("test").scenes(JUDGED, 1, torch.Generator().manual_seed(1))

    def judge(network: Network) -> float:
        outputs = [network(part) for part in images.split(250)]
        found, ends = (torch.cat([output[name] for output in outputs]) for name in ("kind", "box"))
        overlap = (torch.minimum(ends, boxes)[:, 2:] - torch.maximum(ends, boxes)[:, :2]).clamp(min=0).prod(1)
        areas = [(box[:, 2:] - box[:, :2]).clamp(min=0).prod(1) for box in (ends, boxes)]
        right = (found.argmax(1) == kinds) & (overlap / (areas[0] + areas[1] - overlap) > 2 / 3)
        return float(100 * right.double().mean())

    return model, {"input_shape": (1, CANVAS, CANVAS), "objective": ["classes", "values"]}, judge


NETWORKS = {"unet": unet, "embedding": embedding, "detector": detector}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--network", choices=NETWORKS, action="append", help="default: all three")
    parser.add_argument("--presets", default="W8A8,W4A8")
    parser.add_argument("--effort", default="full")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name in arguments.network or NETWORKS:
        began = time.monotonic()
        torch.manual_seed(0)
        model, settings, judge = NETWORKS[name]()
        judged = " ".join((NETWORKS[name].__doc__ or "").split())
        print(f"{name}: trained in {time.monotonic() - began:.0f} s. {judged}")
        for preset in arguments.presets.split(","):
            with tempfile.TemporaryDirectory() as folder:
                result = dfq.quantize(
                    model, **settings, preset=preset, effort=arguments.effort, metric=judge, out=f"{folder}/run"
                )
            rows.append({
                "network": name, "preset": preset, "effort": arguments.effort, "judge": judged,
                "scores": result.scores, "objective": result.objective, "integer_share": result.integer_share,
                "seconds": round(result.seconds),
            })  # fmt: skip
            scores = ", ".join(f"{rung} {score:.2f}" for rung, score in result.scores.items())
            print(f"  {preset}: {scores} ({result.seconds:.0f} s)", flush=True)
    if arguments.json:
        write(arguments.json, rows)


if __name__ == "__main__":
    main()
