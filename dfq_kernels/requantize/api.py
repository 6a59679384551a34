"""Public functions of the operator: checks."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dfq_kernels._checks import check_device
from dfq_kernels._integer_checks import check_epilogue, check_norm, check_quantized, require, wrap
from dfq_kernels.dispatch import resolve
from dfq_kernels.integers import Grid, QuantizedTensor, Requantize, flat

OP = "requantize"


def requantize(
    x: QuantizedTensor,
    outs: Grid | Sequence[Grid] = (),
    *,
    mean: Tensor | None = None,
    mult: Tensor | None = None,
    bias: Tensor | None = None,
    other: QuantizedTensor | None = None,
    activation: str | None = None,
    then: Requantize | None = None,
    packed: bool = False,
    backend: str | None = None,
) -> tuple[QuantizedTensor, ...] | Tensor:
    """Integers to other grids: rescaling, batch normalisation, addition.

        t = (x - zero_point) * scale
        t = (t - mean[c]) * mult[c] + bias[c];  t = t + (other - its zero_point) * its scale    where they are given
        q = clamp(rne(act(t) * (1 / scale) + zero_point), quant_min, quant_max)          for each of outs

    fp32, every operation rounded on its own.

    Args:
        x: `[N, C]` or `[N, C, H, W]`.
        outs: up to 4 grids; none: the result is `act(t)` itself.
        mean, mult, bias: fp32 `[C]`, all or none.
        other: of the shape of x, added.
        activation: None, `relu` or `relu6`.
        then: what follows the first result, computed from its integers.
        packed: whether integers of 4 or 2 bits share bytes, where the channels fill them.
        backend: `native`, `triton` or `reference`; None takes the best that is there.

    Returns:
        One quantized tensor for each of `outs`, then for each of `then.outs`; or fp32 real numbers.

    Raises:
        ValueError: a wrong dtype, shape, device or grid.
        BackendError: an explicit backend that is not there.

    Source: Jacob et al. 2018 (arXiv 1712.05877) appendix A.2 for the addition.
    """
    check_quantized(OP, "x", x, (2, 4))
    channels = x.shape[1]
    norm = check_norm(OP, {"mean": mean, "mult": mult, "bias": bias}, channels, x.q)
    if other is not None:
        check_quantized(OP, "other", other, (2, 4))
        require(OP, other.shape == x.shape, "other", f"of shape {x.shape}", other.shape)
        check_device(OP, "other", other.q, x.q)
    epilogue = check_epilogue(OP, activation, outs, then, packed, channels, x.q)
    results = resolve(OP, backend, x.q).forward(
        x.q, flat(x.grid, x.bits), norm, None if other is None else other.q,
        [] if other is None else flat(other.grid, other.bits), *epilogue.flat(),
    )  # fmt: skip
    return wrap(results, epilogue)


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
