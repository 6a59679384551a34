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
LARGEST_DIVISOR = 2**24  # exact in fp32


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
    count_include_pad: bool = True,
    divisor_override: int | None = None,
    activation: str | None = None,
    packed: bool = False,
    backend: str | None = None,
) -> tuple[QuantizedTensor, ...] | Tensor:
    """Pooling of integers.

        average: t = float(sum over the window of (x - zero_point)) * (scale / count)
                 q = clamp(rne(act(t) * (1 / scale) + zero_point), quant_min, quant_max)    for each of outs
        max:     the largest integer of the window, on the grid of x

    What lies outside of the map adds nothing to a sum, and a maximum does not see it. count: `divisor_override`; else
    the places of a window that lie in the padded map, or, without `count_include_pad`, in the map.

    Args:
        x: `[N, C, H, W]`.
        outs: of an average: up to 4 grids; none: the result is `act(t)` itself. Of a maximum: none.
        mode: `average` or `max`.
        kernel_size, stride, padding, ceil_mode: as in `torch.nn.functional.avg_pool2d` and `max_pool2d`.
        dilation: of a maximum.
        count_include_pad, divisor_override: of an average, as in `torch.nn.functional.avg_pool2d`.
        output_size: of an adaptive pool, instead of a kernel: 1 is global pooling.
        activation: of an average: None, or one of `dfq_kernels.activations`.
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
    require(OP, type(ceil_mode) is bool, "ceil_mode", "true or false", ceil_mode)
    plain = (strides, paddings, dilations, ceil_mode) == ([1, 1], [0, 0], [1, 1], False)
    require(OP, plain or not adaptive, "stride, padding, dilation and ceil_mode", "none of an adaptive pool", "some")
    _check_counting(mode, adaptive, count_include_pad, divisor_override)
    if mode == "max":
        require(OP, not outs and activation is None, "outs and activation", "those of an average", "a maximum")
        epilogue = Epilogue(None, (x.grid,), (x.bits,))  # stored as x is, which may be wider than its grid
    else:
        require(OP, dilations == [1, 1], "dilation", "that of a maximum", "an average")
        bound = x.grid.largest * math.prod(largest_window(x.shape[2:], sides) if adaptive else kernel)
        require(OP, bound <= LARGEST_SUM, "the largest sum", "below 2^31", bound)
        epilogue = check_epilogue(OP, activation, outs, None, packed, x.shape[1], x.q)
    if not adaptive:
        _check_windows(x, kernel, strides, paddings, dilations, ceil_mode)
    results = resolve(OP, backend, x.q).forward(
        x.q, flat(x.grid, x.bits), mode, kernel, strides, paddings, dilations, ceil_mode, sides, count_include_pad,
        divisor_override or 0, *epilogue.flat(),
    )  # fmt: skip
    return wrap(results, epilogue)


def _check_counting(mode: str, adaptive: bool, count_include_pad: bool, divisor: int | None) -> None:
    require(OP, type(count_include_pad) is bool, "count_include_pad", "true or false", count_include_pad)
    known = divisor is None or (type(divisor) is int and 1 <= divisor <= LARGEST_DIVISOR)
    require(OP, known, "divisor_override", f"None or an integer in [1, {LARGEST_DIVISOR}]", divisor)
    plain = count_include_pad and divisor is None
    fits = plain or (mode == "average" and not adaptive)
    require(OP, fits, "count_include_pad and divisor_override", "those of an average of a kernel", "another pool")


def _check_windows(
    x: QuantizedTensor, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int], ceil_mode: bool
) -> None:
    """Every window meets the map."""
    size = x.shape[2:]
    half = all(2 * p <= k for p, k in zip(padding, kernel, strict=True))
    require(OP, half, "padding", "at most half of kernel_size", padding)
    reach = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    spare = [s - 1 if ceil_mode else 0 for s in stride]
    inside = all(side + 2 * p + more >= k for side, k, p, more in zip(size, reach, padding, spare, strict=True))
    require(OP, inside, "kernel_size", f"within {tuple(size)} and its padding", reach)
    counts = out_sides(size, kernel, stride, padding, dilation, ceil_mode)
    meet = windows_meet(size, counts, kernel, stride, padding, dilation)
    require(OP, meet, "kernel_size", "of windows that all meet the map", kernel)
