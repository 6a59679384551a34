"""Public function of the operator: checks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dfq_kernels._checks import check_device, check_storage
from dfq_kernels._integer_checks import check_epilogue, check_quantized, check_vector, require, wrap
from dfq_kernels.dispatch import resolve
from dfq_kernels.integers import Grid, QuantizedTensor, flat

OP = "int_resize"


def int_resize(
    x: QuantizedTensor, outs: Grid | Sequence[Grid] = (), *, rows: Tensor, row_weights: Tensor, columns: Tensor,
    column_weights: Tensor, activation: str | None = None, packed: bool = False, check_places: bool = True,
    backend: str | None = None,
) -> tuple[QuantizedTensor, ...] | Tensor:  # fmt: skip
    """Bilinear interpolation of integers, between the four neighbours that every pixel of the result has.

        h(y) = a[y, left] * (1 - lx) + a[y, right] * lx                a = x - zero_point
        t = (h(top) * (1 - ly) + h(bottom) * ly) * scale
        q = clamp(rne(act(t) * (1 / scale) + zero_point), quant_min, quant_max)          for each of outs

    fp32, every operation rounded on its own.

    Args:
        x: `[N, C, H, W]`.
        outs: up to 4 grids; none: the result is `act(t)` itself.
        rows: int32 `[2, OH]`: top and bottom, of every row of the result; row_weights: fp32 `[OH]`: ly.
        columns: int32 `[2, OW]`: left and right; column_weights: fp32 `[OW]`: lx.
        activation: None, or one of `dfq_kernels.activations`.
        packed: whether integers of 4 or 2 bits share bytes, where the channels fill them.
        check_places: whether to look for rows and columns outside of the map, which waits for a GPU; without, they must
            be inside.
        backend: `native`, `triton` or `reference`; None takes the best that is there.

    Returns:
        One quantized tensor for each of `outs`, channels-last; or fp32 `[N, C, OH, OW]`.

    Raises:
        ValueError: a wrong dtype, shape, device or grid; a place outside of the map.
        BackendError: an explicit backend that is not there.

    Source: the weights are those of `torch.nn.functional.interpolate(mode="bilinear")`, either way of aligning corners.
    """
    check_quantized(OP, "x", x)
    axes = (("rows", rows, row_weights, x.shape[2]), ("columns", columns, column_weights, x.shape[3]))
    for name, places, weights, side in axes:
        known = isinstance(places, Tensor) and places.dtype == torch.int32 and places.layout is torch.strided
        fits = known and places.dim() == 2 and len(places) == 2 and places.numel() > 0
        got = (places.dtype, tuple(places.shape)) if isinstance(places, Tensor) else type(places).__name__
        require(OP, fits, name, "int32 [2, sides of the result]", got)
        check_storage(OP, name, places)
        check_device(OP, name, places, x.q)
        if check_places and not torch.compiler.is_compiling():
            low, high = int(places.min()), int(places.max())
            require(OP, low >= 0 and high < side, name, f"in [0, {side})", (low, high))
        check_vector(OP, f"{name.removesuffix('s')}_weights", weights, places.shape[1], x.q)
    epilogue = check_epilogue(OP, activation, outs, None, packed, x.shape[1], x.q)
    results = resolve(OP, backend, x.q).forward(
        x.q, flat(x.grid, x.bits), rows, row_weights, columns, column_weights, *epilogue.flat()
    )
    return wrap(results, epilogue)
