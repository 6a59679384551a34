"""The SVHN and USPS classifiers of the package `ccexam`, with the weights that it carries, in integers.

The package has four pictures of each data set. Calibrated on these, moved by up to two pixels, and judged on
scikit-learn's 1,797 handwritten digits: scaled to 16x16 for USPS; for SVHN scaled to 32x32 and painted in two colours,
light on dark and dark on light, which is not what the network was trained on.
"""

from __future__ import annotations

from importlib import resources
from typing import Any

import torch
from ccexam.inference import INFERENCE_REGISTRY, build_transform, load_model
from measure import finish, network
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F


def digits(side: int) -> tuple[Tensor, Tensor]:
    """scikit-learn's digits `[N, 1, side, side]` in 0 to 1, and their classes."""
    found = load_digits()
    images = torch.from_numpy(found.images).float()[:, None] / 16
    scaled = F.interpolate(images, size=(side, side), mode="bilinear", align_corners=False)
    return scaled, torch.from_numpy(found.target)


def painted(images: Tensor) -> Tensor:
    """Digits of one random colour on a random background: `[N, 3, H, W]`."""
    random = torch.Generator().manual_seed(0)
    low = torch.rand(len(images), 3, 1, 1, generator=random) * 0.4 + 0.05
    high = low + 0.3 + torch.rand(len(images), 3, 1, 1, generator=random) * 0.2
    swap = torch.rand(len(images), 1, 1, 1, generator=random) < 0.5
    ink, ground = torch.where(swap, low, high), torch.where(swap, high, low)
    return ground + (ink - ground) * images


def moved(images: Tensor, by: int = 2) -> Tensor:
    """Every image at every offset of up to `by` pixels, edges repeated."""
    height, width = images.shape[2:]
    wide = F.pad(images, (by, by, by, by), mode="replicate")
    places = [(y, x) for y in range(2 * by + 1) for x in range(2 * by + 1)]
    return torch.cat([wide[..., y : y + height, x : x + width] for y, x in places])


def samples(name: str, spec: Any) -> Tensor:
    """The package's own pictures of a data set, through its own transform."""
    transform = build_transform(spec.image_size, spec.mean, spec.std, spec.grayscale)
    folder = resources.files("ccexam") / "samples"
    paths = sorted(str(path) for path in folder.iterdir() if path.name.startswith(f"{name}_"))
    return torch.stack([transform(Image.open(path)) for path in paths])


def classifier(name: str) -> dict[str, Any]:
    """One of the package's networks in integers."""
    spec = INFERENCE_REGISTRY[name]
    model = load_model(spec.model_cls, spec.default_checkpoint, "cpu", input_size=spec.image_size)
    images, labels = digits(spec.image_size)
    images = images if spec.grayscale else painted(images)
    mean, std = (torch.tensor(numbers).view(1, -1, 1, 1) for numbers in (spec.mean, spec.std))
    found = network(f"ccexam {name}", model, [moved(samples(name, spec))], (images - mean) / std, labels)
    judged = "scikit-learn's digits" if spec.grayscale else "scikit-learn's digits in colours"
    return found | {"calibrated_on": "the package's 4 pictures, moved by up to 2 pixels", "judged_on": judged}


if __name__ == "__main__":
    finish([classifier("svhn"), classifier("usps")], __doc__)
