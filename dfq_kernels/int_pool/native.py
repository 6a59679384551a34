"""`int_pool` in C++: csrc/cpu/program.cpp."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dfq_kernels.int_pool import schema
from dfq_kernels.integers import Epilogue, unflat, unpack_channels
from dfq_kernels.programs import AVERAGE_POOL, MAX_POOL, OneStep, set_average, set_window, set_windows
from dfq_kernels.registration import register


@register(schema.FORWARD, "native")
def forward(
    x: Tensor, x_grid: list[float], mode: str, kernel: list[int], stride: list[int], padding: list[int],
    dilation: list[int], ceil_mode: bool, output_size: list[int], count_include_pad: bool, divisor: int, *epilogue: Any,
) -> list[Tensor]:  # fmt: skip
    """Average: sums, scaled, and what every operator ends with. Max: integers."""
    grid, bits = unflat(x_grid)
    shape = schema.out_shape(x, bits, kernel, stride, padding, dilation, ceil_mode, output_size)
    window = (x.shape[2:], shape[2:], kernel, stride, padding, output_size)

    def fill(step: Any) -> None:
        if mode == "average":
            factors = schema.multipliers(grid.scale, *window, count_include_pad, divisor)
            set_average(step, factors, schema.spans(*window))
        elif output_size:
            set_windows(step, schema.spans(*window))
        else:
            step.kernel_y, step.kernel_x = kernel
            set_window(step, stride, padding, dilation)

    inputs = [(unpack_channels(x, bits, grid.signed), grid)]
    kind = MAX_POOL if mode == "max" else AVERAGE_POOL
    return OneStep(kind, shape, Epilogue.of(*epilogue), inputs, fill=fill).run(x)
