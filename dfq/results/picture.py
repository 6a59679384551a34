"""A network as a picture: a row for every step, in order, with its bits, its multiplications and its time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfq.results.report import new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROW = 0.19  # inches
INK, PALE, FLOAT = "#1a1a1a", "#f1f3f6", "#c2410c"
MANY, FOUR, TWO, NONE = "#2f6f9f", "#4c9f70", "#b8860b", "#8a94a3"
LONGEST = 34, 25  # characters of a name and of a kind
MADE_UP = "calls_", "quantizers_"  # what names of steps that are no layers of the user's begin with


def save_picture(found: dict[str, Any], path: Path) -> None:
    """Draws the facts of `dfq.engine.inspect.facts`, of `dfq.engine.step_times.timed`, or of a student.

    Args:
        found: with `sequence`; times are drawn where they are known.
        path: the PNG.
    """
    rows = found["sequence"]
    timed = any(row.get("milliseconds") is not None for row in rows)
    height = ROW * (len(rows) + 1) + 1.12
    figure = new_figure((11.5 if timed else 9.0, height))
    widths = [6.6, 2.2, 2.2] if timed else [6.6, 2.2]
    axes = figure.subplots(1, len(widths), width_ratios=widths, sharey=True)
    _names(axes[0], rows)
    _bars(axes[1], rows, [100 * row["share"] for row in rows], "% of multiplications")
    if timed:
        _bars(axes[2], rows, [row.get("milliseconds") for row in rows], "ms on this CPU")
    figure.subplots_adjust(left=0.01, right=0.99, top=1 - 0.62 / height, bottom=0.52 / height, wspace=0.03)
    figure.text(0.01, 1 - 0.12 / height, _title(found), fontsize=9, color=INK, va="top", weight="bold")
    figure.text(0.01, 0.06 / height, _caption(found, timed), fontsize=6.5, color=INK, va="bottom")
    save_figure(figure, path)


def _title(found: dict[str, Any]) -> str:
    size = f", {found['bytes'] / 1000:,.1f} kB" if found.get("bytes") else ""
    shape = "x".join(map(str, found["input_shape"]))
    name = Path(found.get("file", "network")).name
    share = found.get("integer_share", 1.0)
    part = "" if share == 1 else f", {100 * share:.1f} % of them in integers"
    return f"{name}: input {shape}{size}, {found['multiplications_per_image'] / 1e6:,.2f} M multiplications{part}"


def _caption(found: dict[str, Any], timed: bool) -> str:
    said = (
        "wA aB: A bits of weights, B of what the step reads. Multiplications: of convolutions and linear layers.\n"
        "Blue: weights of 5 to 8 bits; green: of 3 or 4; ochre: of 2; grey: none."
    )
    if any(not row["integer"] for row in found["sequence"]):
        said += " Red: in floating point; products of matrices are counted, too."
    if not timed:
        return said
    alone = sum(row["milliseconds"] or 0 for row in found["sequence"])
    return (
        f"{said}\nTime: each step alone, one image, {found['threads']} thread(s), median; its data in the caches. "
        f"Together {alone:.3f} ms; the whole network {found['milliseconds']:.3f} ms. A row with + runs inside of the "
        "one that makes what it reads."
    )


def _names(axis: Axes, rows: list[dict[str, Any]]) -> None:
    """Number, name, kind, shape and bits, as text in columns."""
    columns = {"step": 0.0, "name": 0.05, "kind": 0.43, "result": 0.67, "bits": 0.87}
    _stripes(axis, len(rows))
    axis.set_xlim(0, 1)
    for title, x in columns.items():
        axis.text(x, -1, title, fontsize=7, color=INK, va="center", weight="bold")
    for index, row in enumerate(rows):
        colour = INK if row["integer"] else FLOAT
        cells = str(index), _name(row), _kind(row), "x".join(map(str, row["shape"])), _bits(row)
        for x, text in zip(columns.values(), cells, strict=True):
            axis.text(x, index, text, fontsize=6.5, color=colour, va="center", clip_on=False)


def _name(row: dict[str, Any]) -> str:
    """Its end, where it is long."""
    name = next((row["name"].removeprefix(start) for start in MADE_UP if row["name"].startswith(start)), row["name"])
    return name if len(name) <= LONGEST[0] else "…" + name[1 - LONGEST[0] :]


def _kind(row: dict[str, Any]) -> str:
    """With its activation."""
    kind = row["kind"].removeprefix("aten.").removesuffix(".default").replace("_", " ")
    kind += f", {row['activation']}" if row["activation"] else ""
    kind = ("+ " if row.get("runs_with") else "") + kind
    return kind if len(kind) <= LONGEST[1] else kind[: LONGEST[1] - 1] + "…"


def _bits(row: dict[str, Any]) -> str:
    """Of weights, and of what the step reads."""
    weights = "" if row["weight_bits"] is None else f"w{row['weight_bits']} "
    return weights + (f"a{row['activation_bits']}" if row["activation_bits"] else "")


def _bars(axis: Axes, rows: list[dict[str, Any]], values: list[float | None], title: str) -> None:
    """A bar of every row that has a number, coloured by the bits of its weights."""
    _stripes(axis, len(rows))
    known = [(index, value) for index, value in enumerate(values) if value]
    largest = max((value for _, value in known), default=1.0)
    axis.set_xlim(0, 1.25 * largest)
    axis.text(0, -1, title, fontsize=7, color=INK, va="center", weight="bold")
    colours = [_colour(rows[index]) for index, _ in known]
    axis.barh([index for index, _ in known], [value for _, value in known], height=0.72, color=colours)
    for index, value in known:
        text = f"{value:.3f}" if largest < 10 and "ms" in title else f"{value:.1f}"
        axis.text(value + 0.015 * largest, index, text, fontsize=6, color=INK, va="center")


def _colour(row: dict[str, Any]) -> str:
    bits = row["weight_bits"]
    if not row["integer"]:
        return FLOAT
    return NONE if bits is None else TWO if bits == 2 else FOUR if bits <= 4 else MANY


def _stripes(axis: Axes, count: int) -> None:
    """Every second row on a pale ground; no frame, no ticks; the first row on top."""
    for index in range(0, count, 2):
        axis.axhspan(index - 0.5, index + 0.5, color=PALE, linewidth=0)
    axis.set_ylim(count - 0.4, -1.6)
    axis.axis("off")
