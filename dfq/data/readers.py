"""Files of public data sets to tensors. Every reader: `(folder, split)` -> uint8 `[N, C, H, W]`, int64 `[N]`.

Nothing is unpickled; a file that is not what it should be is a `ValueError`, a missing one a `FileNotFoundError`.
"""

from __future__ import annotations

import gzip
import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional as F

from dfq.data.matlab import read_mat
from dfq.errors import first_line

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".pgm", ".webp")


def _read_bytes(path: Path) -> bytes:
    """The file, or the file with `.gz` after its name, unpacked."""
    packed = path.with_name(path.name + ".gz")
    if not path.exists() and packed.exists():
        return gzip.decompress(packed.read_bytes())
    return path.read_bytes()


def read_idx(path: Path, ndim: int) -> np.ndarray:
    """An IDX file of unsigned bytes with `ndim` axes: `0, 0, 8, ndim`, ndim big-endian int32 sizes, the bytes."""
    data = _read_bytes(path)
    if len(data) < 4 or data[:3] != b"\0\0\x08" or len(data) < 4 + 4 * data[3]:
        raise ValueError(f"{path.name} must be an IDX file of unsigned bytes, got header {data[:4]!r}")
    if data[3] != ndim:
        raise ValueError(f"{path.name} must have {ndim} axes, got {data[3]}")
    shape = np.frombuffer(data, ">u4", count=data[3], offset=4).astype(np.int64)
    body = np.frombuffer(data, np.uint8, offset=4 + 4 * data[3])
    if body.size != shape.prod():
        raise ValueError(f"{path.name} must hold {shape.prod()} bytes after its header, got {body.size} (truncated?)")
    return body.reshape(shape)


def fashion_mnist(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """`[N, 1, 32, 32]`: its two IDX files, 28x28 pixels with two zeros more on every side."""
    prefix = "train" if split == "train" else "t10k"
    pixels = torch.from_numpy(read_idx(folder / f"{prefix}-images-idx3-ubyte", 3).copy())
    if pixels.shape[1:] != (28, 28):
        raise ValueError(f"images must be 28x28, got {pixels.shape[1]}x{pixels.shape[2]}")
    labels = torch.from_numpy(read_idx(folder / f"{prefix}-labels-idx1-ubyte", 1).astype(np.int64))
    return F.pad(pixels[:, None], (2, 2, 2, 2)), labels


def cifar(archive: str, label_bytes: int) -> Callable[[Path, str], tuple[Tensor, Tensor]]:
    """The reader of an archive's binary files: records of `label_bytes` labels, of which the last counts, and
    `[3, 32, 32]` pixels."""
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


def svhn(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """`<split>_32x32.mat`: X `[32, 32, 3, N]`, y from 1 to 10, where 10 is the digit 0."""
    arrays = read_mat((folder / f"{split}_32x32.mat").read_bytes())
    if arrays["X"].dtype != np.uint8 or arrays["X"].ndim != 4:
        raise ValueError(f"X must be bytes with 4 axes, got {arrays['X'].dtype} with {arrays['X'].ndim}")
    pixels = torch.from_numpy(np.ascontiguousarray(arrays["X"].transpose(3, 2, 0, 1)))
    labels = torch.from_numpy(arrays["y"].astype(np.int64).reshape(-1) % 10)
    return pixels, labels


def tiny_imagenet(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """`train/<class>/images`, or `val` by its annotations; a class's number is its line in `wnids.txt`."""
    inner = folder / "tiny-imagenet-200" if (folder / "tiny-imagenet-200").is_dir() else folder
    classes = {name: label for label, name in enumerate((inner / "wnids.txt").read_text().split())}
    if split == "train":
        rows = [
            (path, label)
            for name, label in classes.items()
            for path in picture_files(inner / "train" / name / "images")
        ]
    else:
        lines = (inner / "val" / "val_annotations.txt").read_text().splitlines()
        fields = [line.split("\t") for line in lines if line]
        rows = [(inner / "val" / "images" / field[0], classes[field[1]]) for field in fields]
    return _decode(rows)


def image_folder(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """`<split>/<class>/<image>`; the classes of both splits together are numbered in alphabetical order."""
    inner = folder / split
    if not inner.is_dir():
        raise FileNotFoundError(2, "missing", str(inner))
    rows = [
        (path, label)
        for label, name in enumerate(class_names(folder))
        if (inner / name).is_dir()
        for path in picture_files(inner / name)
    ]
    pixels, labels = _decode(rows)
    return pixels, labels


def class_names(folder: Path) -> list[str]:
    """The class folders of both splits of an image folder, in alphabetical order; hidden ones are somebody else's."""
    splits = [item for item in (folder / "train", folder / "test") if item.is_dir()]
    names = {path.name for item in splits for path in item.iterdir() if path.is_dir()}
    return sorted(name for name in names if not name.startswith("."))


def picture_files(folder: Path) -> list[Path]:
    """The image files of a folder, in alphabetical order; hidden ones are somebody else's."""
    if not folder.is_dir():
        raise FileNotFoundError(2, "missing", str(folder))
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and path.name[0] != ".")


def read_image(path: Path, shape: tuple[int, int, int]) -> Tensor:
    """One image as uint8 `[C, H, W]`: grey or RGB as the channels say, scaled to the size where it has another one.

    It is upright as its EXIF orientation says; 16 bits become 8.

    Raises:
        ValueError: no image, one of 32-bit or floating-point pixels, or channels other than 1 or 3.
    """
    channels, height, width = shape
    if channels not in (1, 3):
        raise ValueError(f"read_image: channels must be 1 or 3 for an image file, got {channels}")
    with _opened(path) as image:
        converted = _eight_bits(image, "L" if channels == 1 else "RGB")
        if converted.size != (width, height):
            converted = converted.resize((width, height), Image.Resampling.BILINEAR)
        array = np.asarray(converted)
    return torch.from_numpy(array.reshape(height, width, channels).transpose(2, 0, 1).copy())


def _eight_bits(image: Image.Image, mode: str) -> Image.Image:
    """The picture upright, of 8 bits a channel. Pillow's own conversion clips deeper pixels at 255.

    Raises:
        ValueError: pixels whose white nobody knows: 32-bit integers, floating point.
    """
    image = ImageOps.exif_transpose(image)
    sixteen = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")  # as older Pillow reads it
    if sixteen:
        pixels = np.asarray(image).astype(np.uint32)
        image = Image.fromarray(((pixels + 128) // 257).astype(np.uint8))  # to nearest: 65535 is 255
    elif image.mode in ("I", "F"):
        raise ValueError(f"pixels must have 8 or 16 bits, got Pillow's mode {image.mode} (32-bit or floating point)")
    return image.convert(mode)


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    data = io.BytesIO(path.read_bytes())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(data) as image:
                yield image
    except Exception as error:  # a damaged file makes Pillow raise whatever its decoder does
        reason = "Pillow knows no such format" if isinstance(error, UnidentifiedImageError) else first_line(error)
        raise ValueError(f"{path} must be an image: {reason}") from error


def _decode(rows: list[tuple[Path, int]]) -> tuple[Tensor, Tensor]:
    """Images as RGB; all must be of one size, which the first image gives."""
    if not rows:
        raise ValueError("no images found")
    pixels: np.ndarray = np.empty(0, np.uint8)
    for index, (path, _) in enumerate(rows):
        with _opened(path) as image:
            array = np.asarray(_eight_bits(image, "RGB"))
        if index == 0:
            pixels = np.empty((len(rows), *array.shape), np.uint8)
        if pixels.shape[1:] != array.shape:
            raise ValueError(
                f"{path} must be {pixels.shape[2]}x{pixels.shape[1]}, got {array.shape[1]}x{array.shape[0]}"
            )
        pixels[index] = array
    labels = torch.tensor([label for _, label in rows])
    return torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()), labels
