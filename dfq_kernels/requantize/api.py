"""Public functions of the operator: checks."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dfq_kernels._checks import check_device
from dfq_kernels._integer_checks import check_constants, check_epilogue, check_quantized, require, wrap
from dfq_kernels.dispatch import resolve
from dfq_kernels.integers import Constants, Grid, QuantizedTensor, Requantize, flat, fp32_of

OP = "requantize"


def requantize(
    x: QuantizedTensor,
    outs: Grid | Sequence[Grid] = (),
    *,
    mean: Tensor | None = None,
    mult: Tensor | None = None,
    bias: Tensor | None = None,
    slope: Tensor | None = None,
    table: Tensor | None = None,
    other: QuantizedTensor | None = None,
    product_scale: float | None = None,
    activation: str | None = None,
    then: Requantize | None = None,
    packed: bool = False,
    backend: str | None = None,
) -> tuple[QuantizedTensor, ...] | Tensor:
    """Integers to other grids: rescaling, batch normalisation, functions, addition, multiplication.

        t = (x - zero_point) * scale, and where they are given, in this order
        t = (t - mean[c]) * mult[c] + bias[c];  t = t > 0 ? t : slope[c] * t
        t = t + (other - its zero_point) * its scale

        t = table[x - quant_min]                                                       with a table, and nothing else
        t = float((x - zero_point) * (other - its zero_point)) * product_scale         with a product_scale

        q = clamp(rne(act(t) * (1 / scale) + zero_point), quant_min, quant_max)          for each of outs

    fp32, every operation rounded on its own.

    Args:
        x: `[N, C]` or `[N, C, H, W]`.
        outs: up to 4 grids; none: the result is `act(t)` itself.
        mean, mult, bias: fp32 `[C]`, all or none.
        slope: fp32 `[C]`: a PReLU.
        table: fp32, a number for every integer of the grid of x: any function of one argument. (An integer that is
            beyond the grid, as storage may hold it, is taken for the nearest of the grid.)
        other: added; of the shape of x, or for every pixel `[N, C]` or `[N, C, 1, 1]`, or for every channel
            `[N, 1, H, W]`.
        product_scale: other is multiplied instead; the product of both scales.
        activation: None, or one of `dfq_kernels.activations`, with its numbers: `relu`, `hardtanh(-1,1)`.
        then: what follows the first result, computed from its integers.
        packed: whether integers of 4 or 2 bits share bytes, where the channels fill them.
        backend: `native`, `triton` or `reference`; None takes the best that is there.

    Returns:
        One quantized tensor for each of `outs`, then for each of `then.outs`; or fp32 real numbers.

    Raises:
        ValueError: a wrong dtype, shape, device or grid; arguments that exclude one another.
        BackendError: an explicit backend that is not there.

    Source: Jacob et al. 2018 (arXiv 1712.05877) appendix A.2 for the addition.
    """
    check_quantized(OP, "x", x, (2, 4))
    channels = x.shape[1]
    constants = Constants(mean, mult, bias, slope, table)
    check_constants(OP, "", constants, channels, x.grid, x.q)
    if other is not None:
        require(OP, table is None, "other", "None beside a table", "one")
        other = _broadcast(x, other)
    if product_scale is not None:
        alone = other is not None and not constants.norm and slope is None
        require(OP, alone, "product_scale", "given with other, and without mean, mult, bias and slope", product_scale)
        normal = isinstance(product_scale, float) and 2.0**-126 <= product_scale <= 2.0**127
        require(OP, normal, "product_scale", "in [2^-126, 2^127]", product_scale)
        product_scale = fp32_of(product_scale)
    epilogue = check_epilogue(OP, activation, outs, then, packed, channels, x.q)
    results = resolve(OP, backend, x.q).forward(
        x.q, flat(x.grid, x.bits), list(constants), None if other is None else other.q,
        [] if other is None else flat(other.grid, other.bits), product_scale, *epilogue.flat(),
    )  # fmt: skip
    return wrap(results, epilogue)


def _broadcast(x: QuantizedTensor, other: QuantizedTensor) -> QuantizedTensor:
    """`other` with as many axes as x, whose shape it must fit."""
    check_quantized(OP, "other", other, (2, 4))
    check_device(OP, "other", other.q, x.q)
    shape, q = other.shape, other.q
    if len(shape) < len(x.shape):
        shape, q = (*shape, 1, 1), q[:, :, None, None]
    elif len(shape) > len(x.shape) and shape[2:] == (1, 1):
        shape, q = shape[:2], q.flatten(1)
    count, channels, *sides = x.shape
    fits = shape in (x.shape, (count, channels, *[1] * len(sides)), (count, 1, *sides))
    require(OP, fits, "other", f"of shape {x.shape}, or a number a channel, or a number a pixel", other.shape)
    return QuantizedTensor(q, other.grid, other.bits)


def dequantize(x: QuantizedTensor, *, backend: str | None = None) -> Tensor:
    """What integers stand for: `(q - zero_point) * scale`, fp32, of the shape of x and channels-last.

    Args:
        x, backend: as in `requantize`, which this is without grids.

    Raises:
        ValueError, BackendError: as in `requantize`.
    """
    result = requantize(x, backend=backend)
    assert isinstance(result, Tensor)
    return result
