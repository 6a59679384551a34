"""Public function of the operator: checks."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from dfq_kernels._integer_checks import LARGEST_SUM, check_epilogue, check_pair, check_quantized, require, wrap
from dfq_kernels.dispatch import resolve
from dfq_kernels.int_pool.schema import largest_window, out_sides, windows_meet
from dfq_kernels.integers import Epilogue, Grid, QuantizedTensor, flat

OP = "int_pool"


def int_pool(
    x: QuantizedTensor,
    outs: Grid | Sequence[Grid] = (),
    *,
    mode: str = "average",
    kernel_size: int | Sequence[int] | None = None,
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
    output_size: int | Sequence[int] | None = None,
    activation: str | None = None,
    packed: bool = False,
    backend: str | None = None,
) -> tuple[QuantizedTensor, ...] | Tensor:
    """Pooling of integers.

        average: t = float(sum over the window of (x - zero_point)) * (scale / count)
                 q = clamp(rne(act(t) * (1 / scale) + zero_point), quant_min, quant_max)    for each of outs
        max:     the largest integer of the window, on the grid of x

    A padded place counts in an average and adds nothing; a maximum does not see it.

    Args:
        x: `[N, C, H, W]`.
        outs: of an average: up to 4 grids; none: the result is `act(t)` itself. Of a maximum: none.
        mode: `average` or `max`.
        kernel_size, stride, padding: as in `torch.nn.functional.avg_pool2d`, or `max_pool2d` with `dilation` and
            `ceil_mode`.
        output_size: of an adaptive average, instead of a kernel: 1 is global pooling.
        activation: of an average: None, `relu` or `relu6`.
        packed: whether integers of 4 or 2 bits share bytes, where the channels fill them; a maximum is stored as x is.
        backend: `native`, `triton` or `reference`; None takes the best that is there.

    Returns:
        One quantized tensor for each of `outs`, channels-last; one, of a maximum; or fp32 `[N, C, OH, OW]`.

    Raises:
        ValueError: a wrong mode, shape or grid; arguments of the other mode.
        BackendError: an explicit backend that is not there.

    Source: Jacob et al. 2018 (arXiv 1712.05877) section 2.
    """
    check_quantized(OP, "x", x)
    outs = (outs,) if isinstance(outs, Grid) else tuple(outs)
    require(OP, mode in ("average", "max"), "mode", "average or max", mode)
    adaptive = output_size is not None
    require(OP, (kernel_size is None) == adaptive, "kernel_size", "given, or output_size, and not both", kernel_size)
    sides = check_pair(OP, "output_size", output_size, 1) if output_size is not None else []
    kernel = check_pair(OP, "kernel_size", 1 if kernel_size is None else kernel_size, 1)
    pairs = (("stride", kernel if stride is None else stride, 1), ("padding", padding, 0), ("dilation", dilation, 1))
    strides, paddings, dilations = (check_pair(OP, *pair) for pair in pairs)
    if mode == "max":
        given = bool(outs) or activation is not None or adaptive
        require(OP, not given, "outs, activation and output_size", "those of an average", "a maximum")
        _check_max(x, kernel, strides, paddings, dilations, ceil_mode)
        outs = (x.grid,)
    else:
        require(OP, dilations == [1, 1] and not ceil_mode, "dilation and ceil_mode", "those of a maximum", "an average")
        _check_average(x, kernel, strides, paddings, sides)
    if mode == "max":  # stored as x is, which may be wider than its grid
        epilogue = Epilogue(None, (x.grid,), (x.bits,))
    else:
        epilogue = check_epilogue(OP, activation, outs, None, packed, x.shape[1], x.q)
    results = resolve(OP, backend, x.q).forward(
        x.q, flat(x.grid, x.bits), mode, kernel, strides, paddings, dilations, ceil_mode, sides, *epilogue.flat()
    )
    return wrap(results, epilogue)


def _check_average(
    x: QuantizedTensor, kernel: list[int], stride: list[int], padding: list[int], sides: list[int]
) -> None:
    size = x.shape[2:]
    if sides:
        plain = (kernel, stride, padding) == ([1, 1], [1, 1], [0, 0])
        require(OP, plain, "stride and padding", "none of an adaptive pool", (stride, padding))
        fits = all(parts <= side for parts, side in zip(sides, size, strict=True))
        require(OP, fits, "output_size", f"at most {size}", sides)
        kernel = largest_window(size, sides)
    else:
        _check_window(kernel, padding, size, (0, 0))
    bound = x.grid.largest * math.prod(kernel)
    require(OP, bound <= LARGEST_SUM, "the largest sum", "below 2^31", bound)


def _check_window(kernel: list[int], padding: list[int], size: Sequence[int], spare: Sequence[int]) -> None:
    """`size`: of the map; `spare`: what a window may reach beyond its padding."""
    half = all(2 * p <= k for p, k in zip(padding, kernel, strict=True))
    require(OP, half, "padding", "at most half of kernel_size", padding)
    inside = all(side + 2 * p + more >= k for side, k, p, more in zip(size, kernel, padding, spare, strict=True))
    require(OP, inside, "kernel_size", f"within {tuple(size)} and its padding", kernel)


def _check_max(
    x: QuantizedTensor, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int], ceil_mode: bool
) -> None:
    require(OP, type(ceil_mode) is bool, "ceil_mode", "true or false", ceil_mode)
    reach = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    half = all(2 * p <= k for p, k in zip(padding, kernel, strict=True))
    require(OP, half, "padding", "at most half of kernel_size", padding)
    _check_window(reach, padding, x.shape[2:], [s - 1 if ceil_mode else 0 for s in stride])
    counts = out_sides(x.shape[2:], kernel, stride, padding, dilation, ceil_mode)
    meet = windows_meet(x.shape[2:], counts, kernel, stride, padding, dilation)
    require(OP, meet, "kernel_size", "of windows that all meet the map", kernel)
