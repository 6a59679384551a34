"""The integer network as plain data: values on grids, and the steps that make them, in order.

Every step ends alike, in fp32, each operation rounded on its own (`t` is what the step computes):

    t = act(t);  q = clamp(rne(t * (1 / scale) + zero_point), quant_min, quant_max)      for each of its results

A result without a grid is `t` itself: the logits. The constants are those of the trained network, computed once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dfq_kernels.integers import Grid

ACTIVATIONS = (None, "relu", "relu6")


@dataclass(frozen=True)
class Step:
    """What all steps have: the value that they read, the values that they make, the activation before rounding."""

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
    """`t = (x - zero_point) * scale`, and with a batch norm `t = (t - mean[c]) * mult[c] + bias[c]`."""

    mean: Tensor | None = None
    mult: Tensor | None = None
    bias: Tensor | None = None
    kind = "rescale"
    tensors = ("mean", "mult", "bias")


@dataclass(frozen=True)
class Add(Step):
    """`t` is the sum of two values, each `(q - zero_point) * scale`."""

    other: str
    kind = "add"


@dataclass(frozen=True)
class AveragePool(Step):
    """`t = float(sum over the window of (x - zero_point)) * (scale / count)`; a padded place counts and adds nothing.

    kernel: of windows at `stride`; None: adaptive, `output` windows an axis.
    """

    kernel: tuple[int, int] | None = None
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    output: tuple[int, int] = (1, 1)
    kind = "average_pool"


@dataclass(frozen=True)
class MaxPool(Step):
    """The largest integer of each window; its one result has the grid of x."""

    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    ceil_mode: bool = False
    kind = "max_pool"


STEPS: dict[str, type[Step]] = {
    step.kind: step for step in (Quantize, Layer, Rescale, Add, AveragePool, MaxPool)
}  # fmt: skip


@dataclass(frozen=True)
class IntegerGraph:
    """A whole network.

    input_shape: `(C, H, W)` of the images, which are the value `images`; grids: of every value that has one; steps: in
    the order of execution; output: the value that is returned; bounds: the largest accumulator of every layer, by its
    name; normalization: mean and deviation per channel of pixels / 255, where they are known.
    """

    input_shape: tuple[int, int, int]
    num_classes: int
    grids: dict[str, Grid]
    steps: tuple[Step, ...]
    output: str
    bounds: dict[str, float]
    normalization: tuple[tuple[float, ...], tuple[float, ...]] | None = None


IMAGES = "images"


def inputs(step: Step) -> list[str]:
    """The values that a step reads."""
    others = [getattr(step, name, None) for name in ("residual", "other")]
    return [step.x, *(name for name in others if name is not None)]
