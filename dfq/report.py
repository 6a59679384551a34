"""What a run has to show: sizes, tables, pictures."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import numpy as np
from matplotlib import pyplot as plt
from rich.table import Table
from torch import Tensor, nn

from dfq.quant.exactness import LayerBound
from dfq.quant.modules import QuantBatchNorm
from dfq.quant.quantizers import ActivationQuantizer, WeightQuantizers, weight_layers


def model_bytes(model: nn.Module) -> int:
    """Bytes of what inference needs: fp32 parameters and statistics, or packed weights and constants.

    A fake-quantized model counts `bits / 8` per weight, and fp32 multiplier and bias per output channel; a batch norm
    that stands on its own keeps its four vectors; every activation quantizer has a scale and a zero point.
    """
    if not any(isinstance(module, WeightQuantizers) for module in model.modules()):
        tensors = [*model.parameters(), *(buffer for buffer in model.buffers() if buffer.is_floating_point())]
        return sum(4 * tensor.numel() for tensor in tensors)
    total = 0.0
    for _, quantizer, weight in weight_layers(model):
        total += weight.numel() * quantizer.bits / 8 + 8 * weight.shape[0]
    for module in model.modules():
        if isinstance(module, QuantBatchNorm) and module.bn is not None:
            total += 16 * module.bn.num_features
        elif isinstance(module, ActivationQuantizer):
            total += 8
    return round(total)


def bounds_table(bounds: Sequence[LayerBound]) -> Table:
    """Bits of every layer and the largest sum that it can meet; fp32 holds sums below 2^24 exactly."""
    table = Table(title="accumulators of the exact forward")
    for heading in ("layer", "weight bits", "input bits", "largest sum", "computed in"):
        table.add_column(heading, justify="left" if heading == "layer" else "right")
    for item in bounds:
        known = item.bound is not None
        sums = ("fp32" if item.exact_in_fp32 else "fp32 or float64, by batch") if known else "fp32, not exact"
        largest = f"{item.bound:,.0f}" if known else ""
        table.add_row(item.layer, str(item.weight_bits), str(item.activation_bits or "float"), largest, sums)
    return table


def accuracy_table(rows: Sequence[tuple[str, float | None, int]], title: str) -> Table:
    """Model, accuracy in percent, size in kB."""
    table = Table(title=title)
    table.add_column("model")
    table.add_column("accuracy %", justify="right")
    table.add_column("below teacher", justify="right")
    table.add_column("size kB", justify="right")
    reference = rows[0][1]
    for name, accuracy, size in rows:
        known = accuracy is not None and reference is not None
        below = f"{reference - accuracy:.2f}" if known and name != rows[0][0] else ""  # type: ignore[operator]
        table.add_row(name, "" if accuracy is None else f"{accuracy:.2f}", below, f"{size / 1000:.1f}")
    return table


def save_image_grid(images: Tensor, path: Path, titles: list[str]) -> None:
    """A row of images per pool member; `[members, count, C, H, W]`, each image stretched to its own range."""
    members, count = images.shape[:2]
    figure, axes = plt.subplots(members, count, figsize=(count * 0.8, members * 0.9), squeeze=False)
    for row in range(members):
        for column in range(count):
            image = images[row, column].float().cpu().numpy()
            low, high = image.min(), image.max()
            image = np.moveaxis((image - low) / max(high - low, 1e-12), 0, -1)
            axes[row][column].imshow(image[..., 0] if image.shape[-1] not in (3, 4) else image, cmap="gray")
            axes[row][column].axis("off")
        axes[row][0].set_title(titles[row], fontsize=7, loc="left")
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def save_curves(rows: list[dict[str, Any]], path: Path) -> None:
    """Every logged loss term over the steps, one panel per owner (generator 0, student 0, ...)."""
    series: dict[str, dict[str, list[tuple[int, float]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        for name, value in row.items():
            if name not in ("step", "phase"):
                owner, _, term = name.rpartition("/")
                series[owner][term].append((row["step"], value))
    if not series:
        return
    figure, axes = plt.subplots(1, len(series), figsize=(4 * len(series), 3), squeeze=False)
    for axis, (owner, terms) in zip(axes[0], series.items(), strict=True):
        for term, points in terms.items():
            axis.plot(*zip(*points, strict=True), label=term, linewidth=1)
        axis.set_title(owner or "loss", fontsize=9)
        axis.set_xlabel("step")
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)
