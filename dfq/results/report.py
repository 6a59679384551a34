"""What a run has to show: sizes, tables, pictures."""

from __future__ import annotations

import io
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

from dfq.layers.batch_norm import QuantBatchNorm
from dfq.quant.exactness import LayerBound
from dfq.quant.quantizers import ActivationQuantizer, WeightQuantizers, weight_layers
from dfq.running.checkpoint import write_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
        if isinstance(module, QuantBatchNorm) and module.tail.bn is not None:
            total += 16 * module.tail.bn.running_mean.numel()
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
        table.add_row(escape(item.layer), str(item.weight_bits), str(item.activation_bits or "float"), largest, sums)
    return table


def accuracy_table(
    rows: Sequence[tuple[str, float | None, int]],
    title: str,
    columns: Mapping[str, Mapping[str, float]] | None = None,
) -> Table:
    """Model, accuracy in percent, below the first row by, size in kB of what inference needs (`model_bytes`, or the
    file), and whatever else is known of some of the models: numbers by heading and model."""
    compared, known = len(rows) > 1, {heading: values for heading, values in (columns or {}).items() if values}
    judged = any(accuracy is not None for _, accuracy, _ in rows)
    table = Table(title=title)
    table.add_column("model")
    shown = ["accuracy %", *(["below teacher"] if compared else [])] if judged else []
    for heading in (*shown, "packed size kB", *known):
        table.add_column(heading, justify="right")
    reference = rows[0][1]
    for index, (name, accuracy, size) in enumerate(rows):
        both = accuracy is not None and reference is not None
        below = f"{reference - accuracy:.2f}" if both and index else ""  # type: ignore[operator]
        cells = ["" if accuracy is None else f"{accuracy:.2f}", *([below] if compared else [])] if judged else []
        others = [f"{values[name]:.4g}" if name in values else "" for values in known.values()]
        table.add_row(escape(name), *cells, f"{size / 1000:.1f}", *others)
    return table


def save_image_grid(rows: Sequence[tuple[str, Tensor, Tensor | None]], path: Path) -> None:
    """A titled row of images `[count, C, H, W]` per pool member, above each image the label that it was made for.

    Each image is stretched to its own range: these are not pictures of anything, but their structure shows.
    """
    count, across, down = max(len(images) for _, images, _ in rows), 1.2, 1.65  # in sides of an image
    figure = new_figure((count * 0.7, len(rows) * 0.95))
    axis = figure.add_axes((0.0, 0.0, 1.0, 1.0))  # one for all: an axis for each image takes longer than the images
    axis.axis("off")
    for line, (title, images, labels) in enumerate(rows):
        bottom = -down * line
        axis.text(0, bottom + 1.26, title, fontsize=7)  # above the labels
        for index, image in enumerate(images.float().cpu().numpy()):
            left, low, high = across * index, image.min(), image.max()
            shown = np.moveaxis((image - low) / max(high - low, 1e-12), 0, -1)
            shown = shown[..., 0] if shown.shape[-1] not in (3, 4) else shown
            axis.imshow(shown, cmap="gray", vmin=0, vmax=1, extent=(left, left + 1, bottom, bottom + 1))
            if labels is not None:
                axis.text(left + 0.98, bottom + 1.02, str(int(labels[index])), fontsize=6, ha="right")
    axis.set_xlim(-0.1, across * count)
    axis.set_ylim(-down * (len(rows) - 1) - 0.1, 1.6)
    save_figure(figure, path)


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
    figure = new_figure((4 * len(series), 3))
    axes = figure.subplots(1, len(series), squeeze=False)
    for axis, (owner, terms) in zip(axes[0], series.items(), strict=True):
        for term, points in terms.items():
            axis.plot(*zip(*points, strict=True), label=term, linewidth=1)
        axis.set_title(owner, fontsize=9)
        axis.set_xlabel("step")
        axis.set_ylabel("loss term, weighted")
        axis.legend(fontsize=7)
    figure.tight_layout()
    save_figure(figure, path)


def new_figure(inches: tuple[float, float]) -> Figure:
    """An empty figure of this width and height, outside of pyplot: no window and no list of figures holds it."""
    from matplotlib.figure import Figure  # half a second, which only a run needs

    return Figure(figsize=inches)


def save_figure(figure: Figure, path: Path) -> None:
    """Drawn by Agg in memory: the caller's matplotlib keeps its backend, and no half picture stays on a full disk."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=110, bbox_inches="tight")
    write_atomic(path, data.getvalue())


def engine_tables(found: dict[str, Any]) -> list[Table]:
    """Layers, steps, values and parts in floating point, of `dfq.engine.inspect.facts` or of a student's."""
    title = f"{found['file']}: {found['multiplications_per_image'] / 1e6:.1f} M multiplications per image"
    if found.get("bytes"):
        title += f", {found['bytes'] / 1000:.1f} kB"
    if "memory_bytes_per_image" in found:
        title += f", {found['memory_bytes_per_image'] / 1000:.1f} kB of memory per image"
    table = Table(title=escape(title))
    table.add_column("layer")
    for heading in ("weights", "weight bits", "activation bits", "kB", "largest sum"):
        table.add_column(heading, justify="right")
    for layer in found["layers"]:
        shape = "x".join(map(str, layer["weight_shape"]))
        bound = "" if layer["bound"] is None else f"{layer['bound']:,.0f}"
        bits = str(layer["weight_bits"]), str(layer["activation_bits"] or "float")
        table.add_row(escape(layer["layer"]), shape, *bits, f"{layer['weight_bytes'] / 1000:.1f}", bound)
    values = found["values"]
    summary = [_values_table(values)] if all("stream" in value for value in values) else []
    floats = [floats_table(found["floats"], found["integer_share"])] if found["floats"] else []
    return [table, _steps_table(found["sequence"]), _grids_table(values), *summary, *floats]


def _steps_table(rows: list[dict[str, Any]]) -> Table:
    """Every step in order; times where they are known."""
    timed = any(row.get("milliseconds") is not None for row in rows)
    table = Table(title="steps, in order")
    table.add_column("step", justify="right")
    table.add_column("kind")
    table.add_column("name")
    for heading in ("result", "% of multiplications", *(["ms"] if timed else [])):
        table.add_column(heading, justify="right")
    for index, row in enumerate(rows):
        kind = row["kind"] + (f", {row['activation']}" if row["activation"] else "")
        kind += "" if row["integer"] else " (floating point)"
        share = f"{100 * row['share']:.1f}" if row["multiplications"] else ""
        cells = [str(index), escape(kind), escape(row["name"]), "x".join(map(str, row["shape"])), share]
        if timed:
            cells.append("" if row["milliseconds"] is None else f"{row['milliseconds']:.3f}")
        table.add_row(*cells)
    return table


def _grids_table(values: list[dict[str, Any]]) -> Table:
    """Every value that is integers, and what these stand for."""
    table = Table(title="values: real number = (integer - zero point) * scale")
    table.add_column("value")
    for heading in ("shape", "bits", "integers", "scale", "zero point", "made by"):
        table.add_column(heading, justify="left" if heading == "made by" else "right")
    for value in values:
        sides, ends = "x".join(map(str, value["shape"])), f"{value['quant_min']} to {value['quant_max']}"
        scale, zero_point = f"{value['scale']:.6g}", str(value["zero_point"])
        table.add_row(escape(value["value"]), sides, str(value["bits"]), ends, scale, zero_point, value["made_by"])
    return table


def floats_table(floats: Sequence[dict[str, Any]], integer_share: float) -> Table:
    """Calls without an integer form, those of one module together."""
    table = Table(title=f"in integers: {100 * integer_share:.1f} % of the multiplications; in floating point:")
    for heading in ("part", "call", "why", "calls", "multiplications"):
        table.add_column(heading, justify="right" if heading in ("calls", "multiplications") else "left")
    groups: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    for item in floats:
        groups[item["module"] or "the model", item["call"], item["why"]].append(item["multiplications"])
    for names, counts in groups.items():
        table.add_row(*map(escape, names), str(len(counts)), f"{sum(counts):,}")
    return table


def _values_table(values: list[dict[str, Any]]) -> Table:
    """How many values have how many bits: inputs of layers alone, and streams."""
    table = Table(title="values between the layers, of one image")
    for heading in ("read by", "bits", "values", "largest"):
        table.add_column(heading, justify="left" if heading == "read by" else "right")
    groups: dict[tuple[bool, int], list[dict[str, Any]]] = defaultdict(list)
    for value in values:
        groups[value["stream"], value["bits"]].append(value)
    for (stream, bits), members in sorted(groups.items()):
        largest = max(members, key=lambda value: math.prod(value["shape"]))["shape"]
        readers = "not layers alone (streams)" if stream else "layers"
        table.add_row(readers, str(bits), str(len(members)), "x".join(map(str, largest)))
    return table
