"""From a finished run to an integer network in a file, and from image files to classes."""

from __future__ import annotations

import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import Tensor, fx, nn

from dfq import embedded
from dfq.checkpoint import CheckpointError
from dfq.data import DATASETS
from dfq.engine import Engine, IntegerGraph
from dfq.errors import check, first_line
from dfq.export import ExportError, export
from dfq.readers import read_image

Normalization = tuple[tuple[float, ...], tuple[float, ...]]
TOP = 3  # classes that are named


def integer_graph(
    model: nn.Module, input_shape: tuple[int, int, int], num_classes: int, data: str | None = None
) -> IntegerGraph:
    """The integer network of a run's product.

    Args:
        model: of `load_run`, on the CPU.
        input_shape, num_classes: of the run's config.
        data: a data set whose mean and deviation the network is given; None: Fashion-MNIST's where its images fit.

    Raises:
        ExportError: a float network, or one that is no integer network.
        ValueError: an unknown data set.
    """
    if not isinstance(model, fx.GraphModule):
        raise ExportError("export: the run must be of a quantized network, got a float one")
    shape = tuple(input_shape)
    if data is None and shape == embedded.INPUT_SHAPE:
        data = embedded.DATASET
    check("export", "data", data, f"one of {', '.join(DATASETS)}", data is None or data in DATASETS)
    normalization: Normalization | None = None
    if data is not None:
        normalization = DATASETS[data].mean, DATASETS[data].std
        fits = len(normalization[0]) == shape[0]
        check("export", "data", data, f"of images with {shape[0]} channels", fits)
    return export(model, shape, num_classes, normalization=normalization)  # type: ignore[arg-type]


def milliseconds(model: Callable[[Tensor], Tensor], input_shape: tuple[int, int, int], seconds: float = 0.1) -> float:
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
    """The images of a file as the network takes them, `[N, C, H, W]`.

    A picture (PNG, JPEG, ...) is one, scaled to the network's size; a NumPy file holds uint8 pixels or normalised
    numbers, `[C, H, W]` or `[N, C, H, W]`.

    Raises:
        ValueError: a file of another kind, shape or type.
        CheckpointError: a file that cannot be read.
    """
    shape = engine.graph.input_shape
    try:
        if path.suffix != ".npy":
            return engine.normalize(read_image(path, shape)[None])
        array = np.load(path, allow_pickle=False)
    except OSError as error:
        raise CheckpointError(f"run: {path} cannot be read: {error.strerror or first_line(error)}") from error
    except (EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"run: {path} must be a NumPy array, got {first_line(error)}") from error
    check("run", str(path), type(array).__name__, "one NumPy array", isinstance(array, np.ndarray))
    array = array[None] if array.ndim == 3 else array
    check("run", str(path), array.shape, f"[N, {', '.join(map(str, shape))}]",
          array.ndim == 4 and array.shape[1:] == shape)  # fmt: skip
    if array.dtype == np.uint8:
        return engine.normalize(torch.from_numpy(array))
    floating = array.dtype in (np.float16, np.float32, np.float64)
    check("run", str(path), str(array.dtype), "uint8 pixels or normalised floating-point numbers", floating)
    return torch.from_numpy(array).float()


def classify(engine: Engine, path: Path) -> list[list[tuple[int, float]]]:
    """For each image of a file its likeliest classes and their probabilities."""
    probabilities = engine(read_images(engine, path)).softmax(1)
    values, classes = probabilities.topk(min(TOP, engine.graph.num_classes), dim=1)
    return [list(zip(*row, strict=True)) for row in zip(classes.tolist(), values.tolist(), strict=True)]
