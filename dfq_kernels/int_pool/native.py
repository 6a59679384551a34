"""`int_pool` in C++: csrc/cpu/program.cpp."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dfq_kernels.int_pool import schema
from dfq_kernels.integers import Epilogue, unflat, unpack_channels
from dfq_kernels.programs import AVERAGE_POOL, MAX_POOL, OneStep, set_average, set_window
from dfq_kernels.registration import register


@register(schema.FORWARD, "native")
def forward(
    x: Tensor, x_grid: list[float], mode: str, kernel: list[int], stride: list[int], padding: list[int],
    dilation: list[int], ceil_mode: bool, output_size: list[int], count_include_pad: bool, divisor: int, *epilogue: Any,
) -> list[Tensor]:  # fmt: skip
    """Average: sums, scaled, and what every operator ends with. Max: integers."""
    grid, bits = unflat(x_grid)
    shape = schema.out_shape(x, bits, kernel, stride, padding, dilation, ceil_mode, output_size)

    def fill(step: Any) -> None:
        step.kernel_y, step.kernel_x = kernel
        set_window(step, stride, padding, dilation)
        if mode == "average":
            set_average(step, grid.scale, schema.spans(x.shape[2:], shape[2:], kernel, stride, padding, output_size))

    inputs = [(unpack_channels(x, bits, grid.signed), grid)]
    return OneStep(
        MAX_POOL if mode == "max" else AVERAGE_POOL, shape, Epilogue.of(*epilogue), inputs, padding, fill
    ).run(x)
