"""What comes before and after an integer network.

Before: whether a student can be one, and how large its weights may be; images of files. After: the likeliest classes;
the time of one image.
"""

from __future__ import annotations

import copy
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from dfq.config import QuantConfig, Recipe
from dfq.data.images import DATASETS, Normalization
from dfq.data.readers import picture_files, read_image
from dfq.engine import Engine, save_graph
from dfq.errors import check, first_line, integer
from dfq.export import check_floats, export
from dfq.method.budget import Budget, check_budget
from dfq.quant import freeze_ranges, prepared_of, set_adapting
from dfq.quant.quantizers import weight_layers
from dfq.running.checkpoint import CheckpointError
from dfq_kernels.packing import stored_bits

TOP = 3  # classes that are named


def normalization_of(data: str) -> Normalization:
    """That of a data set by name."""
    check("export", "data", data, f"one of {', '.join(DATASETS)}", data in DATASETS)
    return DATASETS[data].mean, DATASETS[data].std


@torch.no_grad()
def check_integers(student: fx.GraphModule) -> None:
    """Exports an untrained student: what no integer network has is known before the first step, not after the last.

    Args:
        student: of `dfq.quant.prepare`; a copy of it is calibrated on noise.

    Raises:
        ExportError: it has no integer network; names the part.
    """
    check_floats(student)
    Engine(export(_calibrated_on_noise(student)), backend="reference")


def bytes_but_weights(student: fx.GraphModule) -> int:
    """Of an untrained student's integer network in a file: what remains whatever the bits of its weights."""
    graph = export(_calibrated_on_noise(student))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.safetensors"
        save_graph(graph, path)
        size = path.stat().st_size
    return size - sum(-(-weight.numel() * stored_bits(layer.bits) // 8) for _, layer, weight in weight_layers(student))


def weight_budget(
    average_bits: float | None, size: int | None, student: fx.GraphModule, config: QuantConfig, recipe: Recipe,
    real: bool,
) -> Budget | None:  # fmt: skip
    """What the weights may take, if that was said."""
    if average_bits is None and size is None:
        return None
    check("quantize", "average_bits", average_bits, "given without size", average_bits is None or size is None)
    check("quantize", "recipe", recipe.name, "one with generators, for bits by budget", bool(recipe.generators) or real)
    kept = tuple(config.overrides)
    if average_bits is not None:
        number = isinstance(average_bits, (int, float)) and 2 <= average_bits <= 8
        check("quantize", "average_bits", average_bits, "a number in [2, 8]", number)
        budget = Budget(average_bits=float(average_bits), kept=kept)
    else:
        check("quantize", "config", config.why_no_integers, "one of an integer network, for a size", config.integers)
        check_floats(student)
        others = bytes_but_weights(student)
        budget = Budget(weight_bytes=integer("quantize", "size", size, 1) - others, other_bytes=others, kept=kept)
    check_budget(student, budget, "quantize")
    return budget


def _calibrated_on_noise(student: fx.GraphModule) -> fx.GraphModule:
    """A copy, in evaluation mode."""
    student, shape = copy.deepcopy(student).cpu().train(), prepared_of(student).input_shape
    set_adapting(student, True, batch_norms=False)
    student(torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)))
    set_adapting(student, False)
    freeze_ranges(student)
    return student.eval()  # type: ignore[no-any-return]


def milliseconds(model: Callable[[Tensor], Any], input_shape: tuple[int, ...], seconds: float = 0.1) -> float:
    """The median time of one image."""
    image, times = torch.zeros(1, *input_shape), list[float]()
    with torch.no_grad():
        model(image)
        began = time.perf_counter()
        while time.perf_counter() - began < seconds or len(times) < 5:
            start = time.perf_counter()
            model(image)
            times.append(time.perf_counter() - start)
    return 1e3 * median(times)


def read_images(engine: Engine, path: Path) -> Tensor:
    """The images of a file as an integer network takes them, `[N, C, H, W]`; as `images_of`."""
    return images_of(path, engine.graph.input_shape, engine.normalize, owner="run")


def images_of(path: Path, shape: tuple[int, ...], normalize: Callable[[Tensor], Tensor], *, owner: str) -> Tensor:
    """Images as a network takes them, `[N, C, H, W]`.

    Args:
        path: a picture (PNG, JPEG, ...), scaled to the network's size; a folder of pictures; a NumPy file of uint8
            pixels or normalised numbers, `[C, H, W]` or `[N, C, H, W]`.
        shape: of one image.
        normalize: uint8 pixels to the network's input.
        owner: who is named in errors.

    Raises:
        ValueError: a file of another kind, shape or type; a folder without pictures.
        CheckpointError: a file that cannot be read.
    """
    try:
        if path.is_dir() or path.suffix != ".npy":
            check(owner, "network", shape, "of pictures [C, H, W]", len(shape) == 3)
            channels, height, width = shape
            files = picture_files(path) if path.is_dir() else [path]
            check(owner, str(path), "none", "a folder of pictures", bool(files))
            return normalize(torch.stack([read_image(file, (channels, height, width)) for file in files]))
        array = np.load(path, allow_pickle=False)
    except OSError as error:
        raise CheckpointError(f"{owner}: {path} cannot be read: {error.strerror or first_line(error)}") from error
    except (EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{owner}: {path} must be a NumPy array, got {first_line(error)}") from error
    check(owner, str(path), type(array).__name__, "one NumPy array", isinstance(array, np.ndarray))
    array = array[None] if array.ndim == len(shape) else array
    check(owner, str(path), array.shape, f"[N, {', '.join(map(str, shape))}]",
          array.ndim == len(shape) + 1 and array.shape[1:] == shape)  # fmt: skip
    if array.dtype == np.uint8:
        return normalize(torch.from_numpy(array))
    floating = array.dtype in (np.float16, np.float32, np.float64)
    check(owner, str(path), str(array.dtype), "uint8 pixels or normalised floating-point numbers", floating)
    return torch.from_numpy(array).float()


def classify(engine: Engine, path: Path) -> list[list[tuple[int, float]]]:
    """For each image of a file its likeliest classes and their probabilities."""
    count = engine.graph.num_classes
    check("run", "network", count, "a classifier, of one vector of classes", count is not None)
    probabilities = engine(read_images(engine, path)).softmax(1)
    values, classes = probabilities.topk(min(TOP, probabilities.shape[1]), dim=1)
    return [list(zip(*row, strict=True)) for row in zip(classes.tolist(), values.tolist(), strict=True)]
