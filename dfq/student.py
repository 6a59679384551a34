"""A quantized network for somebody's own loop: made, calibrated on images, exported.

student = dfq.prepare(model, (3, 224, 224), preset="W8A8")
dfq.calibrate(student, batches)
engine = dfq.export_integers(student, "integers.safetensors")
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, fx, nn

from dfq import quant
from dfq.config import QuantConfig, quant_config
from dfq.data.images import Normalization, check_normalization
from dfq.engine import Engine, IntegerGraph, save_graph
from dfq.errors import check
from dfq.export import export
from dfq.export.onnx import save_onnx
from dfq.export.portable import save_portable
from dfq.network.outputs import check_weights


def prepare(
    model: nn.Module,
    input_shape: tuple[int, ...] | Tensor,
    *,
    preset: str | None = None,
    config: QuantConfig | None = None,
) -> fx.GraphModule:
    """A fake-quantized network of a float one, to be calibrated or trained.

    It shares its parameters with `model`. In training its forward is fast and differentiable, and its ranges follow the
    batches; `eval()` is the exact forward, bit-equal to the integer network. Calls without an integer form stay in
    floating point.

    Args:
        model: a float network of one image tensor; whatever torch.export captures.
        input_shape: of one image (`(3, 224, 224)`), or images `[N, ...]`.
        preset: bits, `W8A8` and so on (`dfq.quant_config`); `W8A8` if nothing is given.
        config: a whole `QuantConfig` instead.

    Raises:
        PrepareError: a network that cannot be captured or has nothing to quantize, or images that it does not take.
        ValueError: an unknown preset, or weights that are not fp32.
    """
    check("prepare", "model", type(model).__name__, "a torch.nn.Module", isinstance(model, nn.Module))
    check("prepare", "config", config, "a QuantConfig", config is None or isinstance(config, QuantConfig))
    check("prepare", "config", config, "given without preset", config is None or preset is None)
    config = config or quant_config(preset or "W8A8", owner="prepare")
    check_weights(model, owner="prepare", name="model")
    student = quant.prepare(model, input_shape, config)
    quant.set_adapting(student, True)
    return student


@torch.no_grad()
def calibrate(student: fx.GraphModule, batches: Iterable[Tensor]) -> None:
    """Sets every range on images, and fixes all of them where they are then.

    Args:
        student: of `prepare`; its mode is kept.
        batches: images `[N, ...]`, floating point, normalised as the model's; at least one batch.

    Raises:
        ValueError: no batches, or none without NaN and infinities.
    """
    quant.prepared_of(student, "calibrate")
    mode, count = student.training, 0
    where = next(student.parameters()).device
    student.train()
    quant.set_adapting(student, True, batch_norms=False)
    try:
        for images in batches:
            student(images.to(where))
            count += 1
    finally:
        quant.set_adapting(student, False)
        student.train(mode)
    check("calibrate", "batches", count, "at least one", count > 0)
    unset = quant.unset_ranges(student)
    got = f"no range of {unset[0]}" if unset else "all"
    check("calibrate", "batches", got, "images that are finite in every layer", not unset)
    quant.freeze_ranges(student)


def export_integers(
    student: fx.GraphModule, path: str | Path | None = None, *, normalization: Normalization | None = None
) -> Engine:
    """The integer network: bit-equal to the student in evaluation mode.

    Args:
        student: of `prepare`, with ranges that `calibrate`, or `dfq.quant.freeze_ranges` after training, has fixed. It
            stays as it is.
        path: where to write its file; None: nowhere.
        normalization: mean and deviation per channel of pixels / 255, for an engine that is given pixels.

    Raises:
        ExportError: a part that stays in floating point (names it), or a range that moves or is learned.
        CheckpointError: the file cannot be written.
    """
    graph = integer_graph(student, normalization)
    engine = Engine(graph)
    if path is not None:
        save_graph(graph, Path(path))
    return engine


def integer_graph(student: nn.Module, normalization: Normalization | None = None) -> IntegerGraph:
    """The integer network as plain data; arguments and errors as of `export_integers`."""
    shape = quant.prepared_of(student, "export").input_shape
    normalization = check_normalization("export", normalization, shape[0])
    return export(copy.deepcopy(student).cpu(), normalization=normalization)  # type: ignore[arg-type]


def export_onnx(student: fx.GraphModule, path: str | Path) -> None:
    """Writes the network as ONNX: QuantizeLinear and DequantizeLinear around the integer parts.

    Args:
        student: as in `export_integers`; may have parts in floating point.
        path: the file.

    Raises:
        ExportError: a range that moves or is learned, weights with zero points, or a call without an ONNX form.
        CheckpointError: the file cannot be written.
    """
    known = quant.prepared_of(student, "export")
    if known.floats:
        save_portable(copy.deepcopy(student).cpu(), known.input_shape, Path(path))
    else:
        save_onnx(integer_graph(student), Path(path))
