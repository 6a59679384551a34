"""The integer network as plain data: values on grids, and the steps that make them, in order.

A value of one image is a map `(C, H, W)` or a vector `(C,)`, which is a map of one pixel. All steps but moves and
maxima end alike, in fp32, each operation rounded on its own (`t` is what the step computes):

    t = act(t);  q = clamp(rne(t * (1 / scale) + zero_point), quant_min, quant_max)      for each of its results

A result without a grid is `t` itself: a real number, for an output. The constants are those of the trained network,
computed once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from dfq_kernels.integers import Grid


@dataclass(frozen=True)
class Step:
    """What all steps have: the value that they read, the values that they make, the activation before rounding.

    activation: None, or a name of `dfq_kernels.activations`, with its numbers: `relu`, `leaky_relu(0.1)`.
    """

    x: str
    outs: tuple[str, ...]
    activation: str | None
    kind: ClassVar[str] = ""
    tensors: ClassVar[tuple[str, ...]] = ()


@dataclass(frozen=True)
class Quantize(Step):
    """`t = x`: the images."""

    kind = "quantize"


@dataclass(frozen=True)
class Layer(Step):
    """Convolution or linear layer: `t = float(acc) * mult[c] + bias[c] + float(r - z_r) * s_r`.

        acc = sum of (x - zero_point of x) * weight, int32; padding inserts the zero point

    name: the trained layer's; weight: int8 `[out, in / groups, kh, kw]`, or `[out, in]` of a linear layer, whose input
    is flattened; weight_bits: 2 to 8; mult, bias: fp32 `[out]`; residual: the value r, or None.
    """

    name: str
    weight: Tensor
    weight_bits: int
    mult: Tensor
    bias: Tensor
    residual: str | None
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    kind = "layer"
    tensors = ("weight", "mult", "bias")


@dataclass(frozen=True)
class Rescale(Step):
    """`t = (x - zero_point) * scale`, and where they are there `t = (t - mean[c]) * mult[c] + bias[c]` (all three or
    none), `t = t > 0 ? t : slope[c] * t`."""

    mean: Tensor | None = None
    mult: Tensor | None = None
    bias: Tensor | None = None
    slope: Tensor | None = None
    kind = "rescale"
    tensors = ("mean", "mult", "bias", "slope")


@dataclass(frozen=True)
class Table(Step):
    """`t = values[q - quant_min]`: any function of one argument.

    values: fp32, one for every integer of the grid of x; function: its name, for whoever writes it in another form
    (`silu`, `sigmoid`, ...), or "".
    """

    values: Tensor
    function: str = ""
    kind = "table"
    tensors = ("values",)


@dataclass(frozen=True)
class Add(Step):
    """`t` is the sum of two values, each `(q - zero_point) * scale`.

    other: of the shape of x, or a vector `(C,)` or map `(1, H, W)` that is added to every pixel or every channel.
    """

    other: str
    kind = "add"


@dataclass(frozen=True)
class Multiply(Step):
    """`t = float((x - zero_point) * (other - its zero_point)) * scale`.

    other: as in `Add`; scale: the product of both scales, rounded to fp32.
    """

    other: str
    scale: float
    kind = "multiply"


@dataclass(frozen=True)
class AveragePool(Step):
    """`t = float(sum over the window of (x - zero_point)) * (scale / count)`.

    kernel: of windows at `stride`; None: adaptive, `output` windows an axis. What lies outside of the map adds nothing.
    count: `divisor`, where it is not 0; else the places of the window that lie in the padded map
    (`count_include_pad`), or in the map. ceil_mode: a last window may end outside of the padded map.
    """

    kernel: tuple[int, int] | None = None
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    output: tuple[int, int] = (1, 1)
    ceil_mode: bool = False
    count_include_pad: bool = True
    divisor: int = 0
    kind = "average_pool"


@dataclass(frozen=True)
class MaxPool(Step):
    """The largest integer of each window; its one result has the grid of x. kernel None: adaptive, `output` windows."""

    kernel: tuple[int, int] | None = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    ceil_mode: bool = False
    output: tuple[int, int] = (1, 1)
    kind = "max_pool"


@dataclass(frozen=True)
class Move(Step):
    """Integers to other places: `out[c, y, x]` is one of the inputs' integers, or `fill`.

    others: more inputs, after x; all have the result's grid. shape: `(C, H, W)` of the one result. Where a result comes
    from is said in one of two ways, -1 being `fill`:

        channels int32 [C], pixels int32 [H * W], each None for 0, 1, 2, ...:
            out[c, p] = inputs[channels[c], pixels[p]], the inputs' channels counted one input after the other (all
            inputs have maps of one size)
        index int32 [C * H * W]: of the inputs' elements in the order (C, H, W), counted one input after the other
    """

    shape: tuple[int, int, int]
    others: tuple[str, ...] = ()
    channels: Tensor | None = None
    pixels: Tensor | None = None
    index: Tensor | None = None
    fill: int = 0
    kind = "move"
    tensors = ("channels", "pixels", "index")


@dataclass(frozen=True)
class Resize(Step):
    """Bilinear: of every pixel four neighbours, fp32, rounded after every operation. `a` is `x - zero_point`.

        h(y) = a[y, left] * (1 - lx) + a[y, right] * lx
        t = (h(top) * (1 - ly) + h(bottom) * ly) * scale

    rows: int32 `[2, OH]`, top and bottom of every row; row_weights: fp32 `[OH]`, ly; columns, column_weights: likewise
    left, right and lx.
    """

    rows: Tensor
    row_weights: Tensor
    columns: Tensor
    column_weights: Tensor
    kind = "resize"
    tensors = ("rows", "row_weights", "columns", "column_weights")


STEPS: dict[str, type[Step]] = {
    step.kind: step
    for step in (Quantize, Layer, Rescale, Table, Add, Multiply, AveragePool, MaxPool, Move, Resize)
}  # fmt: skip


@dataclass(frozen=True)
class Output:
    """One result of a network.

    value: a real one. shape: of one image. order: int64, which elements of the value, in the order (C, H, W), fill
    `shape` one after the other; None: all of them as they come. function: what follows, in floating point: None,
    `softmax` or `log_softmax` along `axis` of `[N, *shape]`.
    """

    value: str
    shape: tuple[int, ...]
    order: Tensor | None = None
    function: str | None = None
    axis: int = 1


@dataclass(frozen=True)
class IntegerGraph:
    """A whole network.

    input_shape: of one image, which is the value `images`; as a map: `image_map`. grids: of every value that has one;
    steps: in the order of execution; outputs: what is returned; bounds: the largest accumulator of every layer, by its
    name; normalization: mean and deviation per channel of pixels / 255, where they are known; structure: how outputs
    are nested: the number of one, a list, or a dict with text for keys; 0: the first output is returned as it is.
    """

    input_shape: tuple[int, ...]
    grids: dict[str, Grid]
    steps: tuple[Step, ...]
    outputs: tuple[Output, ...]
    bounds: dict[str, float] = field(default_factory=dict)
    normalization: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    structure: Any = 0

    @property
    def num_classes(self) -> int | None:
        """Of a classifier: a network of one output that is a vector."""
        alone = len(self.outputs) == 1 and self.structure == 0 and len(self.outputs[0].shape) == 1
        return self.outputs[0].shape[0] if alone else None


IMAGES = "images"


def as_map(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """`(C, H, W)` of the same elements in the same order: a vector is one pixel, two axes a map of height 1, and of
    more than three the axes in the middle are one."""
    first, *middle = shape or (1,)
    last = middle.pop() if middle else 1
    height = 1
    for side in middle:
        height *= side
    return first, height, last


def inputs(step: Step) -> list[str]:
    """The values that a step reads."""
    others = [getattr(step, name, None) for name in ("residual", "other")]
    return [step.x, *(name for name in others if name is not None), *getattr(step, "others", ())]
