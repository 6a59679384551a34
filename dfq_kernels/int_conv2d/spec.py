"""Cases of `int_conv2d`: storage of both operands, geometry, groups, one channel a group, sums at their limit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dfq_kernels.int_conv2d.api import int_conv2d, pack_weight
from dfq_kernels.int_conv2d.schema import out_shape
from dfq_kernels.integer_cases import ENDS, Arguments, as_tensors, bytes_moved, following, grid, integers, on_device
from dfq_kernels.integers import Grid, QuantizedTensor, one_or_two
from dfq_kernels.specs import Case, OpSpec, nbytes


def _call(
    x: Tensor, bits: int, on: Grid, mult: Tensor, bias: Tensor, residual: Tensor | None = None,
    backend: str | None = None, **keywords: Any,
) -> Any:  # fmt: skip
    if residual is not None:
        width = keywords.pop("residual_bits")
        keywords["residual"] = QuantizedTensor(residual, keywords.pop("residual_grid"), width)
    weight = keywords.pop("weight").to(x.device)
    keywords["then"] = on_device(keywords.get("then"), x)
    return as_tensors(int_conv2d(QuantizedTensor(x, on, bits), weight, mult, bias, backend=backend, **keywords))


def _sides(x: Tensor, weight: Tensor, keywords: dict[str, Any]) -> tuple[int, ...]:
    geometry = [
        one_or_two(keywords.get(name, least)) for name, least in (("stride", 1), ("padding", 0), ("dilation", 1))
    ]
    return out_shape(x, weight, *geometry)


def _case(
    name: str, shape: tuple[int, int, int, int], weight_shape: tuple[int, int, int, int], on: Grid,
    weight_bits: int = 8, *, packed_x: bool = False, residual: Grid | None = None, then: bool = False, **keywords: Any,
) -> Case:  # fmt: skip
    def make(generator: torch.Generator) -> Arguments:
        x, limit = integers(generator, shape, on, packed_x), 2 ** (weight_bits - 1)
        q = torch.randint(-limit, limit, weight_shape, generator=generator).to(torch.int8)
        weight = pack_weight(q, weight_bits)
        size = on.largest * limit
        tensors = {
            "x": x["q"], "mult": torch.randn(weight_shape[0], generator=generator) * 8 / size,
            "bias": torch.randn(weight_shape[0], generator=generator),
        }  # fmt: skip
        arguments = {"bits": x["bits"], "on": on, "weight": weight, **keywords}
        if residual is not None:
            kept = integers(generator, _sides(x["q"], q, keywords), residual, packed_x)
            tensors["residual"] = kept["q"]
            arguments |= {"residual_bits": kept["bits"], "residual_grid": residual}
        if then:
            arguments["then"] = following(generator, weight_shape[0])
        return tensors, arguments

    return Case(name, make)


def _limit(generator: torch.Generator) -> Arguments:
    """Sums of -127 * 255 * 66,000, just inside of int32, and their rounding to fp32."""
    x, q = torch.full((1, 66000, 1, 1), 255, dtype=torch.uint8), torch.full((2, 66000, 1, 1), 127, dtype=torch.int8)
    q[1] = -127
    tensors = {"x": x, "mult": torch.tensor([2.0**-24, 2.0**-20]), "bias": torch.zeros(2)}
    return tensors, {"bits": 8, "on": grid(8, zero_point=0), "weight": pack_weight(q), "outs": ()}


def _bytes_moved(tensors: dict[str, Any], keywords: dict[str, Any]) -> tuple[int, int]:
    weight = keywords["weight"].q
    count, channels, height, width = _sides(tensors["x"], weight, keywords)
    forward, backward = bytes_moved(tensors, keywords, count * height * width, channels)
    return forward + nbytes(weight), backward


SPEC = OpSpec(
    op="int_conv2d",
    call=_call,
    differentiable=(),
    cases=(
        _case("u8_s8", (2, 16, 7, 5), (12, 16, 3, 3), grid(8), padding=1, **ENDS["one"]),
        _case("stem", (2, 3, 9, 9), (16, 3, 3, 3), grid(8, zero_point=255), stride=2, padding=1, then=True,
              **ENDS["one"]),
        _case("s8_s4", (1, 32, 5, 5), (33, 32, 1, 1), grid(8, True), 4, residual=grid(8, True), **ENDS["real"]),
        _case("u4_s4", (2, 32, 6, 6), (32, 32, 3, 3), grid(4), 4, packed_x=True, padding=(1, 0),
              residual=grid(4, True), then=True, **ENDS["packed"]),
        _case("s4_s2", (2, 20, 6, 6), (8, 20, 2, 3), grid(4, True), 2, packed_x=True, padding=1, dilation=2,
              **ENDS["one"]),
        _case("u2_s8", (2, 12, 6, 6), (20, 12, 3, 3), grid(2), packed_x=True, padding=1, stride=(1, 2),
              **ENDS["packed"]),
        _case("s2_s2", (1, 64, 4, 4), (16, 64, 3, 3), grid(2, True), 2, packed_x=True, padding=1, **ENDS["packed"]),
        _case("odd_channels", (2, 7, 5, 5), (5, 7, 3, 3), grid(8), 5, padding=2, **ENDS["one"]),
        _case("groups", (2, 24, 5, 5), (18, 8, 3, 3), grid(4), 4, packed_x=True, groups=3, padding=1, **ENDS["packed"]),
        _case("depthwise", (2, 36, 6, 5), (36, 1, 3, 3), grid(8), groups=36, padding=1, residual=grid(8),
              **ENDS["packed"]),
        _case("depthwise_packed", (2, 20, 9, 9), (20, 1, 5, 3), grid(2, True), 4, packed_x=True, groups=20, padding=2,
              stride=2, then=True, **ENDS["one"]),
        _case("depthwise_twice", (1, 6, 5, 5), (12, 1, 3, 3), grid(8), groups=6, **ENDS["one"]),
        _case("groups_real", (2, 8, 4, 4), (6, 4, 3, 3), grid(8), groups=2, **ENDS["real"]),
        _case("any_range", (2, 8, 4, 4), (6, 8, 1, 1), grid(8), packed=True,
              outs=(Grid(0.5, 0, -1, 2), Grid(0.5, 3, 2, 5), Grid(0.5, 0, -4, 11))),
        Case("sums_at_the_limit", _limit),
        _case("empty", (0, 8, 5, 5), (4, 8, 3, 3), grid(8), **ENDS["one"]),
    ),
    bytes_moved=_bytes_moved,
    mutations=(
        ("- grid.zero_point\n", "\n"),
        ("acc.float() * quantize.per_channel(mult, acc) + quantize.per_channel(bias, acc)",
         "(acc.double() * quantize.per_channel(mult, acc) + quantize.per_channel(bias, acc)).float()"),
        ("F.conv2d(whole, factors,", "F.conv2d(whole.float(), factors.float(),"),
        ("t = t + quantize.real(unpack_channels(residual, bits, grid.signed), grid)", "pass"),
        ("stride, padding, dilation, groups).round()", "stride, padding, [1, 1], groups).round()"),
    ),
)  # fmt: skip
