"""The real readers on small files that the tests write, and what they say when files are wrong."""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dfq.data.images import DATASETS, Batches, DataError, augment, load_images
from dfq.data.readers import image_folder, read_image

COUNT = 6


def idx(array: np.ndarray) -> bytes:
    return b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def mat(arrays: dict[str, np.ndarray], compressed: bool) -> bytes:
    """A MATLAB level 5 file, written from its specification."""

    def element(kind: int, data: bytes) -> bytes:
        return struct.pack("<II", kind, len(data)) + data + b"\0" * (-len(data) % 8)

    data = b"MATLAB 5.0 MAT-file".ljust(124) + b"\0\x01IM"
    for name, array in arrays.items():
        flags = element(6, struct.pack("<II", 9, 0))
        shape = element(5, np.array(array.shape, "<i4").tobytes())
        label = struct.pack("<HH", 1, len(name)) + name.encode().ljust(4, b"\0")  # the small form
        body = element(14, flags + shape + label + element(2, array.tobytes(order="F")))
        data += struct.pack("<II", 15, len(zlib.compress(body))) + zlib.compress(body) if compressed else body
    return data


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (COUNT, 3, 32, 32), dtype=np.uint8)


def write_cifar10(root: Path, pixels: np.ndarray) -> None:
    folder = root / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    rows = np.concatenate([np.arange(COUNT, dtype=np.uint8)[:, None], pixels.reshape(COUNT, -1)], axis=1)
    for name in (*[f"data_batch_{index}.bin" for index in range(1, 6)], "test_batch.bin"):
        (folder / name).write_bytes(rows.tobytes())


def write_cifar100(root: Path, pixels: np.ndarray) -> None:
    root.mkdir(parents=True)
    labels = np.stack([np.full(COUNT, 19), np.arange(COUNT) + 90], axis=1).astype(np.uint8)  # coarse, fine
    for name in ("train.bin", "test.bin"):
        (root / name).write_bytes(np.concatenate([labels, pixels.reshape(COUNT, -1)], axis=1).tobytes())


def write_svhn(root: Path, pixels: np.ndarray) -> None:
    root.mkdir(parents=True)
    labels = np.array([1, 2, 3, 4, 5, 10], np.uint8)[:, None]  # 10 stands for the digit 0
    for split, compressed in (("train", True), ("test", False)):
        (root / f"{split}_32x32.mat").write_bytes(mat({"X": pixels.transpose(2, 3, 1, 0), "y": labels}, compressed))


def write_fashion_mnist(root: Path, pixels: np.ndarray) -> None:
    root.mkdir(parents=True)
    for prefix, pack in (("train", gzip.compress), ("t10k", bytes)):
        suffix = ".gz" if prefix == "train" else ""
        (root / f"{prefix}-images-idx3-ubyte{suffix}").write_bytes(pack(idx(pixels[:, 0, 2:30, 2:30])))
        (root / f"{prefix}-labels-idx1-ubyte{suffix}").write_bytes(pack(idx(np.arange(COUNT, dtype=np.uint8))))


def save_png(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image.transpose(1, 2, 0)).save(path)


def write_tiny_imagenet(root: Path, pixels: np.ndarray) -> None:
    names = [f"n{index:08d}" for index in range(COUNT)]
    lines = []
    for index, name in enumerate(names):
        save_png(root / "train" / name / "images" / f"{name}_0.png", pixels[index])
        save_png(root / "val" / "images" / f"val_{index}.png", pixels[index])
        lines.append(f"val_{index}.png\t{name}\t0\t0\t9\t9")
    (root / "wnids.txt").write_text("\n".join(names))
    (root / "val" / "val_annotations.txt").write_text("\n".join(lines))


def write_image_folder(root: Path, pixels: np.ndarray) -> None:
    for split in ("train", "test"):
        for index in range(COUNT):
            save_png(root / split / f"class{index}" / "image.png", pixels[index])


WRITERS = {
    "cifar10": write_cifar10, "cifar100": write_cifar100, "svhn": write_svhn, "fashion-mnist": write_fashion_mnist,
    "tiny-imagenet": write_tiny_imagenet, "image-folder": write_image_folder,
}  # fmt: skip


@pytest.mark.parametrize("name", DATASETS)
@pytest.mark.parametrize("split", ["train", "test"])
def test_readers_return_what_was_written(tmp_path: Path, pixels: np.ndarray, name: str, split: str) -> None:
    WRITERS[name](tmp_path / name, pixels)
    images = load_images(name, split, tmp_path / name)
    expected = torch.from_numpy(pixels)
    if name == "fashion-mnist":
        expected = torch.nn.functional.pad(expected[:, :1, 2:30, 2:30], (2, 2, 2, 2))
    if name == "cifar10" and split == "train":
        expected = expected.repeat(5, 1, 1, 1)
    assert torch.equal(images.pixels, expected)
    labels = {"cifar100": [90, 91, 92, 93, 94, 95], "svhn": [1, 2, 3, 4, 5, 0]}.get(name, list(range(COUNT)))
    assert images.labels.tolist()[:COUNT] == labels and images.labels.dtype == torch.int64
    normalized = images.normalize(images.pixels)
    assert normalized.dtype == torch.float32
    assert float(normalized[0, 0, 3, 3]) == pytest.approx(
        (int(images.pixels[0, 0, 3, 3]) / 255 - images.mean[0]) / images.std[0], abs=1e-5
    )


@pytest.mark.parametrize("name", DATASETS)
def test_missing_files_name_the_place_and_the_page(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError) as error:
        load_images(name, "test", tmp_path / "nowhere")
    text = str(error.value)
    assert str(tmp_path / "nowhere") in text and DATASETS[name].page in text and DATASETS[name].place in text
    assert "\n" not in text


@pytest.mark.parametrize("name", DATASETS)
def test_truncated_files_are_errors(tmp_path: Path, pixels: np.ndarray, name: str) -> None:
    WRITERS[name](tmp_path, pixels) if not tmp_path.exists() else WRITERS[name](tmp_path / "d", pixels)
    for path in (tmp_path / "d").rglob("*"):
        if path.is_file() and path.suffix != ".txt":
            path.write_bytes(path.read_bytes()[:-700] if path.stat().st_size > 1000 else path.read_bytes()[:-1])
    for split in ("train", "test"):
        with pytest.raises(DataError, match=f"{name} .{split}. in .* cannot be read"):
            load_images(name, split, tmp_path / "d")


def test_labels_out_of_range_and_mixed_sizes(tmp_path: Path, pixels: np.ndarray) -> None:
    write_cifar10(tmp_path / "c", pixels)
    path = tmp_path / "c" / "cifar-10-batches-bin" / "test_batch.bin"
    path.write_bytes(b"\x0a" + path.read_bytes()[1:])
    with pytest.raises(DataError, match=r"labels .* must be in \[0, 10\), got 10"):
        load_images("cifar10", "test", tmp_path / "c")
    write_image_folder(tmp_path / "f", pixels)
    save_png(tmp_path / "f" / "test" / "class0" / "small.png", pixels[0, :, :16])
    with pytest.raises(DataError, match="small.png must be 32x32, got 32x16"):
        load_images("image-folder", "test", tmp_path / "f")


def test_files_of_another_shape_than_the_data_set_s(tmp_path: Path, pixels: np.ndarray) -> None:
    def refused(name: str, text: str) -> None:
        with pytest.raises(DataError, match=f"cannot be read: {text}"):
            load_images(name, "test", tmp_path / name)

    write_fashion_mnist(tmp_path / "fashion-mnist", pixels)
    labels = tmp_path / "fashion-mnist" / "t10k-labels-idx1-ubyte"
    labels.write_bytes(idx(np.zeros((COUNT, 1, 1), np.uint8)))
    refused("fashion-mnist", "t10k-labels-idx1-ubyte must have 1 axes, got 3")
    (tmp_path / "fashion-mnist" / "t10k-images-idx3-ubyte").write_bytes(idx(pixels[:, 0]))
    refused("fashion-mnist", "images must be 28x28, got 32x32")

    write_svhn(tmp_path / "svhn", pixels)
    test = tmp_path / "svhn" / "test_32x32.mat"
    test.write_bytes(mat({"X": pixels[0].copy(), "y": np.ones((COUNT, 1), np.uint8)}, compressed=False))
    refused("svhn", "X must be bytes with 4 axes, got uint8 with 3")
    test.write_bytes(test.read_bytes()[:128] + struct.pack("<II", 15, len(zlib.compress(b""))) + zlib.compress(b""))
    refused("svhn", "'X'")


def test_image_folders_have_the_classes_of_both_splits_and_no_hidden_ones(tmp_path: Path, pixels: np.ndarray) -> None:
    write_image_folder(tmp_path, pixels)
    save_png(tmp_path / "train" / "zebra" / "image.png", pixels[0])
    save_png(tmp_path / "test" / ".ipynb_checkpoints" / "image.png", pixels[0])
    save_png(tmp_path / "test" / "class0" / "._image.png", pixels[0])
    images = load_images("image-folder", "test", tmp_path)
    assert (images.num_classes, len(images)) == (COUNT + 1, COUNT)


def test_damaged_images_are_named(tmp_path: Path, pixels: np.ndarray) -> None:
    write_image_folder(tmp_path, pixels)
    bomb = bytearray(70)
    bomb[:2], bomb[10:14], bomb[14:18] = b"BM", struct.pack("<I", 54), struct.pack("<I", 40)
    bomb[18:26], bomb[26:30] = struct.pack("<ii", 30_000, 30_000), struct.pack("<HH", 1, 24)
    broken = tmp_path / "test" / "class0" / "a.bmp"
    whole = (tmp_path / "test" / "class1" / "image.png").read_bytes()
    for data in (bytes(bomb), b"", b"BM", whole[:60], whole[:40] + b"\xff" * 20 + whole[60:]):
        broken.write_bytes(data)
        with pytest.raises(DataError, match=r"a\.bmp must be an image: .") as error:
            load_images("image-folder", "test", tmp_path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "split", "text"), [("mnist", "test", "name must be one of"), ("svhn", "extra", "split must be")]
)
def test_unknown_names(name: str, split: str, text: str) -> None:
    with pytest.raises(DataError, match=text):
        load_images(name, split)


@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_become_eight_and_deeper_pixels_are_refused(tmp_path: Path, channels: int) -> None:
    """Whatever the depth, white is white; of 32 bits nobody knows which number is white."""
    deep = np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16)
    deep[0, :3] = 0, 65535, 257 * 100 + 128
    expected = np.rint(deep / 257).astype(np.uint8)
    for suffix in ("png", "tiff"):
        Image.fromarray(deep).save(tmp_path / f"a.{suffix}")
        found = read_image(tmp_path / f"a.{suffix}", (channels, 16, 16))
        assert all(np.array_equal(plane, expected) for plane in found.numpy())
    for name, array in (("int.tiff", deep.astype(np.int32)), ("float.tiff", (deep / 65535).astype(np.float32))):
        Image.fromarray(array).save(tmp_path / name)
        with pytest.raises(ValueError, match=f"{name} must be an image: pixels must have 8 or 16 bits, got"):
            read_image(tmp_path / name, (channels, 16, 16))
    folder = tmp_path / "data" / "train" / "a"
    folder.mkdir(parents=True)
    Image.fromarray(deep).save(folder / "x.png")
    pixels, _ = image_folder(tmp_path / "data", "train")
    assert np.array_equal(pixels[0, 0].numpy(), expected)


def test_a_picture_is_upright_as_its_orientation_says(tmp_path: Path) -> None:
    upright = np.zeros((8, 12, 3), np.uint8)
    upright[:4, :6] = 255
    for orientation, turned in ((3, np.rot90(upright, 2)), (6, np.rot90(upright, 1)), (8, np.rot90(upright, -1))):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(np.ascontiguousarray(turned)).save(tmp_path / "a.png", exif=exif)
        found = read_image(tmp_path / "a.png", (3, 8, 12)).numpy().transpose(1, 2, 0)
        assert np.array_equal(found, upright), orientation


def test_the_embedded_test_images() -> None:
    images = load_images("fashion-mnist", "test")
    assert images.pixels.shape == (10_000, 1, 32, 32)
    assert torch.bincount(images.labels).tolist() == [1000] * 10
    normalized = images.normalize(images.pixels)
    assert float(normalized.mean()) == pytest.approx(0, abs=0.02) and float(normalized.std()) == pytest.approx(
        1, abs=0.02
    )


def test_batches_depend_on_nothing_but_seed_and_step(tmp_path: Path, pixels: np.ndarray) -> None:
    write_cifar10(tmp_path / "c", pixels)
    images = load_images("cifar10", "train", tmp_path / "c")
    one, other = Batches(images, 4, 5, augmented=True), Batches(images, 4, 5, augmented=True)
    assert one.steps_per_epoch == 7
    for step in (9, 0, 3):  # asked in another order
        assert all(torch.equal(a, b) for a, b in zip(one[step], other[step], strict=True))
    assert not torch.equal(one[0][0], one[7][0])
    plain = Batches(images, 30, 0, augmented=False)
    assert plain[0][1].sort().values.tolist() == sorted(list(range(COUNT)) * 5)  # an epoch has every image once
    with pytest.raises(DataError, match="batch_size must be at most the number of images 30, got 31"):
        Batches(images, 31, 0, augmented=False)


def test_augmentation_shifts_and_mirrors(random: torch.Generator) -> None:
    image = torch.arange(1, 65, dtype=torch.uint8).reshape(1, 1, 8, 8).repeat(200, 1, 1, 1)
    out = augment(image, random, shift=2)
    padded = torch.nn.functional.pad(image[0, 0], (2, 2, 2, 2))
    allowed = set()
    for top in range(5):
        for left in range(5):
            view = padded[top : top + 8, left : left + 8]
            allowed |= {view.numpy().tobytes(), view.flip(1).numpy().tobytes()}
    found = {item[0].numpy().tobytes() for item in out}
    assert found <= allowed and len(found) > 40  # of 50
