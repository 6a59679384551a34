"""`int_conv2d` in C++: csrc/cpu/convolve.h. Integers of few bits are bytes there."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dfq_kernels.int_conv2d import schema
from dfq_kernels.integers import Epilogue, unflat, unpack_channels
from dfq_kernels.programs import CONVOLVE, OneStep, set_layer, set_window
from dfq_kernels.registration import register


def one_step(
    x: Tensor, x_grid: list[float], weight: Tensor, sums: Tensor, weight_bits: int, mult: Tensor, bias: Tensor,
    stride: list[int], padding: list[int], dilation: list[int], groups: int, residual: Tensor | None,
    residual_grid: list[float], *epilogue: Any,
) -> OneStep:  # fmt: skip
    """The program of `forward`, to be run again and again on this `x`: the first run packs its weights."""
    grid, bits = unflat(x_grid)
    inputs = [(unpack_channels(x, bits, grid.signed), grid)]
    if residual is not None:
        other, width = unflat(residual_grid)
        inputs.append((unpack_channels(residual, width, other.signed), other))

    def fill(step: Any) -> None:
        set_layer(step, unpack_channels(weight, weight_bits, signed=True), mult, bias, groups)
        set_window(step, stride, padding, dilation)

    shape = schema.out_shape(x, weight, stride, padding, dilation)
    return OneStep(CONVOLVE, shape, Epilogue.of(*epilogue), inputs, padding, fill)


@register(schema.FORWARD, "native")
def forward(x: Tensor, *rest: Any) -> list[Tensor]:
    """`t = float(acc) * mult[c] + bias[c] + float(r - z_r) * s_r`, and what every operator ends with."""
    return one_step(x, *rest).run(x)
