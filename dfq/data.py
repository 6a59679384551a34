"""Real images, for training a teacher and for evaluation only. The data-free method never reads them.

Every reader returns `Images`: uint8 pixels and labels in memory, with the mean and deviation that the network's
normalised input space uses. Nothing is unpickled and nothing is downloaded: a missing file is an error that names
the expected place and the page to download from.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional as F

from dfq.seeds import random_source

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".pgm", ".webp")


class DataError(ValueError):
    """A data set's files are missing, truncated or of another kind."""


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
        return (pixels.float() / 255 - mean) / std

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
    num_classes: int
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
    except (
        EOFError,
        OSError,
        ValueError,
        KeyError,
        IndexError,
        zlib.error,
        tarfile.TarError,
        UnidentifiedImageError,
    ) as error:
        raise DataError(f"load_images: {name} ({split}) in {folder} cannot be read: {error}") from error
    if len(pixels) == 0 or len(pixels) != len(labels):
        raise DataError(f"load_images: {name} ({split}) in {folder} has {len(pixels)} images and {len(labels)} labels")
    num_classes = info.num_classes or int(labels.max()) + 1
    if int(labels.min()) < 0 or int(labels.max()) >= num_classes:
        raise DataError(f"load_images: labels in {folder} must be in [0, {num_classes}), got {int(labels.max())}")
    return Images(pixels, labels, info.mean, info.std, num_classes)


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
    index = torch.arange(count)[:, None, None, None], torch.arange(channels)[None, :, None, None]
    return padded[(*index, rows[:, None, :, None], columns[:, None, None, :])]


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


# --- readers: folder, split -> uint8 [N, C, H, W], int64 [N] -----------------------------------------------------


def _read_bytes(path: Path) -> bytes:
    """The file, or the file with `.gz` behind its name, unpacked."""
    packed = path.with_name(path.name + ".gz")
    if not path.exists() and packed.exists():
        return gzip.decompress(packed.read_bytes())
    return path.read_bytes()


def read_idx(path: Path) -> np.ndarray:
    """An IDX file of unsigned bytes: `0, 0, 8, ndim`, ndim big-endian int32 sizes, the bytes."""
    data = _read_bytes(path)
    if len(data) < 4 or data[:3] != b"\0\0\x08" or len(data) < 4 + 4 * data[3]:
        raise ValueError(f"{path.name} must be an IDX file of unsigned bytes, got header {data[:4]!r}")
    shape = np.frombuffer(data, ">u4", count=data[3], offset=4).astype(np.int64)
    body = np.frombuffer(data, np.uint8, offset=4 + 4 * data[3])
    if body.size != shape.prod():
        raise ValueError(f"{path.name} must hold {shape.prod()} bytes after its header, got {body.size} (truncated?)")
    return body.reshape(shape)


def _fashion_mnist(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    prefix = "train" if split == "train" else "t10k"
    pixels = torch.from_numpy(read_idx(folder / f"{prefix}-images-idx3-ubyte").copy())
    labels = torch.from_numpy(read_idx(folder / f"{prefix}-labels-idx1-ubyte").astype(np.int64))
    return F.pad(pixels[:, None], (2, 2, 2, 2)), labels


def _cifar(archive: str, label_bytes: int) -> Callable[[Path, str], tuple[Tensor, Tensor]]:
    files = {
        ("cifar-10-batches-bin", "train"): [f"data_batch_{i}.bin" for i in range(1, 6)],
        ("cifar-10-batches-bin", "test"): ["test_batch.bin"],
        ("cifar-100-binary", "train"): ["train.bin"],
        ("cifar-100-binary", "test"): ["test.bin"],
    }

    def read(folder: Path, split: str) -> tuple[Tensor, Tensor]:
        inner = folder / archive if (folder / archive).is_dir() else folder
        record = label_bytes + 3072
        rows = []
        for name in files[archive, split]:
            data = np.frombuffer(_read_bytes(inner / name), np.uint8)
            if data.size == 0 or data.size % record:
                raise ValueError(f"{name} must hold records of {record} bytes, got {data.size} bytes (truncated?)")
            rows.append(data.reshape(-1, record))
        table = np.concatenate(rows)
        pixels = torch.from_numpy(table[:, label_bytes:].reshape(-1, 3, 32, 32).copy())
        return pixels, torch.from_numpy(table[:, label_bytes - 1].astype(np.int64))

    return read


def _svhn(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    from dfq.matlab import read_mat  # a reader of its own: MATLAB's container is used by this data set alone

    arrays = read_mat((folder / f"{split}_32x32.mat").read_bytes())
    pixels = torch.from_numpy(np.ascontiguousarray(arrays["X"].transpose(3, 2, 0, 1)))
    labels = torch.from_numpy(arrays["y"].astype(np.int64).reshape(-1) % 10)
    return pixels, labels


def _tiny_imagenet(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    inner = folder / "tiny-imagenet-200" if (folder / "tiny-imagenet-200").is_dir() else folder
    classes = {name: label for label, name in enumerate((inner / "wnids.txt").read_text().split())}
    if split == "train":
        rows = [
            (path, label) for name, label in classes.items() for path in _image_files(inner / "train" / name / "images")
        ]
    else:
        lines = (inner / "val" / "val_annotations.txt").read_text().splitlines()
        fields = [line.split("\t") for line in lines if line]
        rows = [(inner / "val" / "images" / field[0], classes[field[1]]) for field in fields]
    return _decode(rows)


def _image_folder(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """`<split>/<class>/<image>`; the classes of both splits together are numbered in alphabetical order."""
    inner = folder / split
    if not inner.is_dir():
        raise FileNotFoundError(2, "missing", str(inner))
    splits = [item for item in (folder / "train", folder / "test") if item.is_dir()]
    names = sorted({path.name for item in splits for path in item.iterdir() if path.is_dir()})
    rows = [
        (path, label)
        for label, name in enumerate(names)
        if (inner / name).is_dir()
        for path in _image_files(inner / name)
    ]
    pixels, labels = _decode(rows)
    return pixels, labels


def _image_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise FileNotFoundError(2, "missing", str(folder))
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)


def _decode(rows: list[tuple[Path, int]]) -> tuple[Tensor, Tensor]:
    """Images as RGB; all must be of one size, which the first image gives."""
    if not rows:
        raise ValueError("no images found")
    pixels: np.ndarray = np.empty(0, np.uint8)
    for index, (path, _) in enumerate(rows):
        with Image.open(io.BytesIO(path.read_bytes())) as image:
            array = np.asarray(image.convert("RGB"))
        if index == 0:
            pixels = np.empty((len(rows), *array.shape), np.uint8)
        if pixels.shape[1:] != array.shape:
            raise ValueError(
                f"{path} must be {pixels.shape[2]}x{pixels.shape[1]}, got {array.shape[1]}x{array.shape[0]}"
            )
        pixels[index] = array
    labels = torch.tensor([label for _, label in rows])
    return torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()), labels


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
        read=_fashion_mnist,
        **_FASHION,
    ),
    "cifar10": DatasetInfo(
        page="https://www.cs.toronto.edu/~kriz/cifar.html (binary version)",
        place="cifar-10-batches-bin/{data_batch_1..5,test_batch}.bin",
        num_classes=10,
        read=_cifar("cifar-10-batches-bin", 1),
        **_CIFAR10,
    ),
    "cifar100": DatasetInfo(
        page="https://www.cs.toronto.edu/~kriz/cifar.html (binary version)",
        place="cifar-100-binary/{train,test}.bin",
        num_classes=100,
        read=_cifar("cifar-100-binary", 2),
        **_CIFAR100,
    ),
    "svhn": DatasetInfo(
        page="http://ufldl.stanford.edu/housenumbers/ (format 2)",
        place="{train,test}_32x32.mat",
        num_classes=10,
        read=_svhn,
        **_SVHN,
    ),
    "tiny-imagenet": DatasetInfo(
        page="http://cs231n.stanford.edu/tiny-imagenet-200.zip",
        place="tiny-imagenet-200/{wnids.txt,train,val}",
        num_classes=200,
        read=_tiny_imagenet,
        **_IMAGENET,
    ),
    "image-folder": DatasetInfo(
        page="your own images",
        place="{train,test}/<class>/<image files of one size>",
        num_classes=0,
        read=_image_folder,
        **_IMAGENET,
    ),
}
