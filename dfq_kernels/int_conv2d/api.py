"""Public functions of the operator: checks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dfq_kernels._checks import check_device, check_storage
from dfq_kernels._integer_checks import (
    LARGEST_SUM,
    check_epilogue,
    check_geometry,
    check_quantized,
    check_vector,
    require,
    wrap,
)
from dfq_kernels.dispatch import resolve
from dfq_kernels.int_conv2d.schema import out_shape
from dfq_kernels.integers import (
    Grid,
    PackedWeight,
    QuantizedTensor,
    Requantize,
    channels_last,
    flat,
    pack_channels,
    storage_width,
)

OP = "int_conv2d"


def int_conv2d(
    x: QuantizedTensor,
    weight: PackedWeight,
    mult: Tensor,
    bias: Tensor,
    outs: Grid | Sequence[Grid] = (),
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    residual: QuantizedTensor | None = None,
    activation: str | None = None,
    then: Requantize | None = None,
    packed: bool = False,
    backend: str | None = None,
) -> tuple[QuantizedTensor, ...] | Tensor:
    """Convolution of integers, and everything up to the next integers.

        acc = sum of (x - zero_point) * weight, int32;  padding inserts the zero point
        t = float(acc) * mult[c] + bias[c] + float(residual - its zero_point) * its scale
        q = clamp(rne(act(t) * (1 / scale) + zero_point), quant_min, quant_max)          for each of outs

    fp32 after the sum, every operation rounded on its own. With `mult = x.grid.scale * weight scale` (times a batch
    norm's factor) it is the convolution of what the integers stand for.

    Args:
        x: `[N, C, H, W]`.
        weight: of `pack_weight`, `[O, C / groups, kh, kw]`.
        mult, bias: fp32 `[O]`, finite.
        outs: up to 4 grids; none: the result is `act(t)` itself.
        stride, padding, dilation, groups: as in `torch.nn.functional.conv2d`.
        residual: of the result's shape, added.
        activation: None, or one of `dfq_kernels.activations`, with its numbers: `relu`, `hardtanh(-1,1)`.
        then: what follows the first result, computed from its integers.
        packed: whether integers of 4 or 2 bits share bytes, where the channels fill them.
        backend: `native`, `triton` or `reference`; None takes the best that is there.

    Returns:
        One quantized tensor for each of `outs`, then for each of `then.outs`, channels-last; or fp32 `[N, O, OH, OW]`.

    Raises:
        ValueError: a wrong dtype, shape, device or grid; sums that could leave int32.
        BackendError: an explicit backend that is not there.

    Source: Jacob et al. 2018 (arXiv 1712.05877) section 2.4.
    """
    check_quantized(OP, "x", x)
    check_weight(OP, weight, x)
    geometry = check_geometry(OP, x.shape, weight.shape, stride, padding, dilation, groups)
    outer = weight.shape[0]
    for name, vector in (("mult", mult), ("bias", bias)):
        check_vector(OP, name, vector, outer, x.q)
    if residual is not None:
        shape = out_shape(x.q, weight.q, *geometry[:3])
        check_quantized(OP, "residual", residual)
        require(OP, residual.shape == shape, "residual", f"of shape {shape}", residual.shape)
        check_device(OP, "residual", residual.q, x.q)
    epilogue = check_epilogue(OP, activation, outs, then, packed, outer, x.q)
    results = resolve(OP, backend, x.q).forward(
        x.q, flat(x.grid, x.bits), weight.q, weight.sums, weight.bits, mult, bias, *geometry,
        None if residual is None else residual.q, [] if residual is None else flat(residual.grid, residual.bits),
        *epilogue.flat(),
    )  # fmt: skip
    return wrap(results, epilogue)


def int_linear(
    x: QuantizedTensor,
    weight: PackedWeight,
    mult: Tensor,
    bias: Tensor,
    outs: Grid | Sequence[Grid] = (),
    *,
    residual: QuantizedTensor | None = None,
    activation: str | None = None,
    then: Requantize | None = None,
    packed: bool = False,
    backend: str | None = None,
) -> tuple[QuantizedTensor, ...] | Tensor:
    """Linear layer of integers: `int_conv2d` of maps of one pixel.

    Args:
        x: `[N, I]`.
        weight: of `pack_weight`, `[O, I]`.
        mult, bias, outs, residual, activation, then, packed, backend: as in `int_conv2d`; residual `[N, O]`.

    Returns:
        As `int_conv2d`, `[N, O]`.

    Raises:
        ValueError, BackendError: as in `int_conv2d`.
    """
    check_quantized("int_linear", "x", x, (2,))
    if residual is not None:
        check_quantized("int_linear", "residual", residual, (2,))
        residual = _pixel(residual)
    if isinstance(weight, PackedWeight):
        require("int_linear", weight.shape[1:] == (x.shape[1], 1, 1), "weight", f"[O, {x.shape[1]}]", weight.shape)
    results = int_conv2d(
        _pixel(x), weight, mult, bias, outs, residual=residual, activation=activation, then=then, packed=packed,
        backend=backend,
    )  # fmt: skip
    if isinstance(results, Tensor):
        return results.flatten(1)
    return tuple(QuantizedTensor(result.q.flatten(1), result.grid, result.bits) for result in results)


def _pixel(x: QuantizedTensor) -> QuantizedTensor:
    return QuantizedTensor(x.q[:, :, None, None], x.grid, x.bits)


def pack_weight(weight: Tensor, bits: int = 8) -> PackedWeight:
    """A weight as `int_conv2d` and `int_linear` read it; once, before the network runs.

    Args:
        weight: int8 `[O, I, kh, kw]` or `[O, I]`; integers of `bits` bits.
        bits: 2 to 8. Stored in 8, 4 or 2, in the narrowest that holds them and whose bytes the channels fill.

    Raises:
        ValueError: a wrong dtype, shape or number of bits, or integers that do not fit.
    """
    name = "pack_weight"
    if not isinstance(weight, Tensor) or weight.dtype != torch.int8 or weight.dim() not in (2, 4) or not weight.numel():
        got = (weight.dtype, tuple(weight.shape)) if isinstance(weight, Tensor) else type(weight).__name__
        raise ValueError(f"{name}: weight must be int8 [O, I, kh, kw] or [O, I], got {got}")
    check_storage(name, "weight", weight)
    require(name, type(bits) is int and 2 <= bits <= 8, "bits", "in [2, 8]", bits)
    low, high = int(weight.min()), int(weight.max())
    require(name, -(2 ** (bits - 1)) <= low and high < 2 ** (bits - 1), "weight", f"of {bits} bits", (low, high))
    rows = weight.flatten(1).to(torch.int64)
    width = storage_width(bits, weight.shape[1])
    q = channels_last(pack_channels(channels_last(weight), width))
    return PackedWeight(q, width, rows.sum(1).to(torch.int32), int(rows.abs().sum(1).max()))


def check_weight(op: str, weight: object, x: QuantizedTensor) -> None:
    """A packed weight whose sums of products with x stay in int32."""
    if not isinstance(weight, PackedWeight):
        raise ValueError(f"{op}: weight must be a PackedWeight (see pack_weight), got {type(weight).__name__}")
    for name, tensor in (("weight", weight.q), ("weight: sums", weight.sums)):
        require(op, isinstance(tensor, Tensor), name, "a tensor", type(tensor).__name__)
        check_storage(op, name, tensor)
        check_device(op, name, tensor, x.q)
    require(op, weight.bits in (8, 4, 2), "weight: bits", "8, 4 or 2", weight.bits)
    dtype = torch.int8 if weight.bits == 8 else torch.uint8
    fits = weight.q.dtype == dtype and weight.q.dim() == 4 and weight.q.numel() > 0
    require(op, fits, "weight", f"{dtype} [O, I, kh, kw]", (weight.q.dtype, tuple(weight.q.shape)))
    fits = weight.sums.dtype == torch.int32 and weight.sums.shape == weight.q.shape[:1] and weight.sums.is_contiguous()
    require(op, fits, "weight: sums", f"int32 [{len(weight.q)}]", (weight.sums.dtype, tuple(weight.sums.shape)))
    require(op, weight.bound(x.grid) <= LARGEST_SUM, "the largest sum", "below 2^31", weight.bound(x.grid))
