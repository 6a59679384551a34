"""Real images, for training a teacher and for evaluation only. The data-free method never reads them.

Every reader returns `Images`: uint8 pixels and labels in memory, with the mean and deviation that the network's
normalised input space uses. Nothing is unpickled and nothing is downloaded: a missing file is an error that names
the expected place and the page to download from.
"""

from __future__ import annotations

import hashlib
import math
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dfq.data import readers
from dfq.errors import check
from dfq.running.seeds import random_source

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


class DataError(ValueError):
    """A data set's files are missing, truncated or of another kind."""


Normalization = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and deviation per channel of pixels / 255."""


@dataclass(frozen=True)
class Images:
    """A labelled set in memory.

    pixels: uint8 `[N, C, H, W]`; labels: int64 `[N]`; mean, std: one number per channel, in units of pixel / 255.
    """

    pixels: Tensor
    labels: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_classes: int

    def __post_init__(self) -> None:
        pixels, labels, classes = self.pixels, self.labels, self.num_classes
        rules = {
            "pixels must be uint8 [N, C, H, W]": pixels.dtype == torch.uint8 and pixels.dim() == 4,
            "labels must be int64 [N]": labels.dtype == torch.int64 and labels.shape == pixels.shape[:1],
            "mean must be one number per channel": len(self.mean) == pixels.shape[1:2].numel(),
            "std must be one number > 0 per channel": len(self.std) == len(self.mean) and all(v > 0 for v in self.std),
            f"labels must be in [0, {classes})": not len(labels)
            or 0 <= int(labels.min()) <= int(labels.max()) < classes,
        }
        for rule, holds in rules.items():
            if not holds:
                name = rule.split()[0]
                value = getattr(self, name)
                got = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else value
                raise DataError(f"Images: {rule}, got {got}")

    def __len__(self) -> int:
        return self.pixels.shape[0]

    @property
    def input_shape(self) -> tuple[int, int, int]:
        channels, height, width = self.pixels.shape[1:]
        return channels, height, width

    def normalize(self, pixels: Tensor) -> Tensor:
        """uint8 pixels to the network's input: `(pixels / 255 - mean) / std`, fp32."""
        mean = torch.tensor(self.mean, device=pixels.device).view(-1, 1, 1)
        std = torch.tensor(self.std, device=pixels.device).view(-1, 1, 1)
        full = torch.full((), 255.0, device=pixels.device)  # a GPU multiplies by the reciprocal of a number
        return (pixels.float() / full - mean) / std

    def digest(self) -> str:
        """SHA-256 of pixels and labels: which images these are."""
        return hashlib.sha256(self.pixels.numpy().tobytes() + self.labels.numpy().tobytes()).hexdigest()

    def head(self, count: int) -> Images:
        """The first `count` images."""
        return replace(self, pixels=self.pixels[:count], labels=self.labels[:count])


@dataclass(frozen=True)
class DatasetInfo:
    """What is known of a data set before its files are read."""

    page: str
    place: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_classes: int  # 0: as many as an image folder has
    read: Callable[[Path, str], tuple[Tensor, Tensor]]


def load_images(name: str, split: str, root: Path | None = None) -> Images:
    """Reads a whole split.

    Args:
        name: a key of `DATASETS`.
        split: `train` or `test`.
        root: the folder that holds the files; default `$DFQ_DATA/<name>` (`DFQ_DATA` defaults to `~/.cache/dfq`),
            for Fashion-MNIST also Debian's folder and, for the test split, the images in this package.

    Raises:
        DataError: files that are missing, truncated or malformed.
    """
    if name not in DATASETS:
        raise DataError(f"load_images: name must be one of {', '.join(DATASETS)}, got {name!r}")
    if split not in ("train", "test"):
        raise DataError(f"load_images: split must be train or test, got {split!r}")
    info = DATASETS[name]
    folder = root if root is not None else _default_root(name, split)
    try:
        pixels, labels = info.read(folder, split)
    except FileNotFoundError as error:
        raise DataError(
            f"load_images: {name} ({split}) needs {info.place} in {folder}; missing: {error.filename}; "
            f"download it from {info.page}"
        ) from error
    except (EOFError, OSError, ValueError, LookupError, zlib.error) as error:
        raise DataError(f"load_images: {name} ({split}) in {folder} cannot be read: {error}") from error
    if len(pixels) == 0 or len(pixels) != len(labels):
        raise DataError(f"load_images: {name} ({split}) in {folder} has {len(pixels)} images and {len(labels)} labels")
    num_classes = info.num_classes or len(readers.class_names(folder))
    if int(labels.min()) < 0 or int(labels.max()) >= num_classes:
        raise DataError(f"load_images: labels in {folder} must be in [0, {num_classes}), got {int(labels.max())}")
    return Images(pixels, labels, info.mean, info.std, num_classes)


def check_normalization(owner: str, value: Any, channels: int, images: Images | None = None) -> Normalization | None:
    """`value` as tuples of floats; that of `images` where it is None; None where nobody says it.

    Raises:
        ValueError: not a mean and a deviation > 0 for each of `channels`.
    """
    if value is None:
        return None if images is None else (tuple(images.mean), tuple(images.std))
    try:
        mean, std = (tuple(float(number) for number in part) for part in value)
    except (TypeError, ValueError):
        mean = std = ()
    fits = len(mean) == len(std) == channels and all(map(math.isfinite, (*mean, *std))) and min(std) > 0
    check(owner, "normalization", value, f"(mean, std) of {channels} channels of pixels / 255, std > 0", fits)
    return mean, std


def augment(pixels: Tensor, generator: torch.Generator, *, shift: int = 2, flip: bool = True) -> Tensor:
    """Shifts each image by up to `shift` pixels in both directions (zeros come in) and mirrors half of them."""
    count, channels, height, width = pixels.shape
    padded = F.pad(pixels, (shift, shift, shift, shift))
    top, left = torch.randint(0, 2 * shift + 1, (2, count), generator=generator)
    rows = top[:, None] + torch.arange(height)
    columns = left[:, None] + torch.arange(width)
    if flip:
        mirrored = torch.rand(count, generator=generator) < 0.5
        columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    image, channel = torch.arange(count)[:, None, None, None], torch.arange(channels)[None, :, None, None]
    return padded[image, channel, rows[:, None, :, None], columns[:, None, None, :]]


class Batches:
    """`batches[step]` is a shuffled batch of normalised images and labels, the same whenever it is asked for.

    An epoch's last, smaller batch is dropped.
    """

    def __init__(self, images: Images, batch_size: int, seed: int, *, augmented: bool) -> None:
        if batch_size > len(images):
            raise DataError(f"Batches: batch_size must be at most the number of images {len(images)}, got {batch_size}")
        self.images, self.batch_size, self.seed, self.augmented = images, batch_size, seed, augmented
        self.steps_per_epoch = len(images) // batch_size
        self._epoch, self._order = -1, torch.empty(0)

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        epoch, index = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            source = random_source(self.seed, "order", epoch)
            self._epoch, self._order = epoch, torch.randperm(len(self.images), generator=source)
        chosen = self._order[index * self.batch_size : (index + 1) * self.batch_size]
        pixels = self.images.pixels[chosen]
        if self.augmented:
            pixels = augment(pixels, random_source(self.seed, "augment", step))
        return self.images.normalize(pixels), self.images.labels[chosen]


def _default_root(name: str, split: str) -> Path:
    root = Path(os.environ.get("DFQ_DATA", str(Path.home() / ".cache" / "dfq"))) / name
    if name != "fashion-mnist" or root.exists():
        return root
    if split == "test":
        return Path(str(resources.files("dfq") / "assets"))
    return DEBIAN_FASHION_MNIST


_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
_CIFAR10 = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616)}
_CIFAR100 = {"mean": (0.5071, 0.4866, 0.4409), "std": (0.2673, 0.2564, 0.2762)}
_SVHN = {"mean": (0.4377, 0.4438, 0.4728), "std": (0.1980, 0.2010, 0.1970)}
# of the training images padded to 32x32: the network's input has zero mean and unit variance
_FASHION = {"mean": (0.2190,), "std": (0.3318,)}

DATASETS: dict[str, DatasetInfo] = {
    "fashion-mnist": DatasetInfo(
        page="https://github.com/zalandoresearch/fashion-mnist (or Debian's package dataset-fashion-mnist)",
        place="{train,t10k}-{images-idx3,labels-idx1}-ubyte[.gz]",
        num_classes=10,
        read=readers.fashion_mnist,
        **_FASHION,
    ),
    "cifar10": DatasetInfo(
        page="https://www.cs.toronto.edu/~kriz/cifar.html (binary version)",
        place="cifar-10-batches-bin/{data_batch_1..5,test_batch}.bin",
        num_classes=10,
        read=readers.cifar("cifar-10-batches-bin", 1),
        **_CIFAR10,
    ),
    "cifar100": DatasetInfo(
        page="https://www.cs.toronto.edu/~kriz/cifar.html (binary version)",
        place="cifar-100-binary/{train,test}.bin",
        num_classes=100,
        read=readers.cifar("cifar-100-binary", 2),
        **_CIFAR100,
    ),
    "svhn": DatasetInfo(
        page="http://ufldl.stanford.edu/housenumbers/ (format 2)",
        place="{train,test}_32x32.mat",
        num_classes=10,
        read=readers.svhn,
        **_SVHN,
    ),
    "tiny-imagenet": DatasetInfo(
        page="http://cs231n.stanford.edu/tiny-imagenet-200.zip",
        place="tiny-imagenet-200/{wnids.txt,train,val}",
        num_classes=200,
        read=readers.tiny_imagenet,
        **_IMAGENET,
    ),
    "image-folder": DatasetInfo(
        page="your own images",
        place="{train,test}/<class>/<image files of one size>",
        num_classes=0,
        read=readers.image_folder,
        **_IMAGENET,
    ),
}
