"""Weights, scales and biases of a layer as ONNX takes them: int8, scales above 0, biases that int32 can hold."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dfq.export.items import ExportError
from dfq_kernels.integers import Grid

ROOM = 2.0**30  # of the accumulators' 2^31: what a channel's sums and its bias may take
SMALLEST = 2.0**-125  # scale, and product with the input's scale: normal in fp32
LARGEST = 2.0**120  # scale, so that 8-bit integers times it are finite
NOTHING_LEFT = -9  # 8-bit integers without their 9 lowest bits are 0


class Channels(NamedTuple):
    """weight: int8, as it was; scale, bias: fp32 `[out]`; sign: `[out]`, multiplies the sums and the bias together."""

    weight: Tensor
    scale: Tensor
    bias: Tensor
    sign: Tensor


def channels(weight: Tensor, mult: Tensor, bias: Tensor, x: Grid, name: str) -> Channels:
    """`(sum (x - z) * w) * mult + bias` with a weight scale of `|mult| / x.scale`.

    Where the sums or the bias would leave int32, or a scale would not be normal, weights are divided by a power of 2
    and rounded. That is where they hardly move the channel: by at most `|bias| / 2^31` for every unit of the input. A
    channel that nothing moves has weights 0.

    Args:
        weight: integers `[out, ...]` in -128 to 127.
        mult, bias: fp32 `[out]`.
        x: the grid of the input.
        name: of the layer, for the error.

    Raises:
        ExportError: a weight scale is beyond fp32.
    """
    flat, size, shift = weight.flatten(1).double(), mult.double().abs(), bias.double()
    sums = x.largest * flat.abs().sum(1)
    room = ROOM / (sums + shift.abs() / size.clamp(min=1e-300)).clamp(min=1)
    normal = size / SMALLEST * min(1.0, 1 / x.scale)
    bits = torch.log2(torch.minimum(room, normal)).floor().clamp(min=NOTHING_LEFT, max=0)
    constant = (bits == NOTHING_LEFT) | (flat == 0).all(1)
    least = torch.where(shift == 0, x.scale, shift.abs() / ROOM).clamp(min=SMALLEST * max(1.0, x.scale))
    scale = torch.where(constant, least, size / torch.exp2(bits)) / x.scale
    if float(scale.max()) > LARGEST:
        rule = f"weight scales of {name} must be at most 2^120 in ONNX"
        raise ExportError(f"export: {rule}, got {float(scale.max()):.3g}")
    turned = torch.where(mult < 0, -1.0, 1.0).double()
    integers = (flat * torch.exp2(bits)[:, None]).round() * torch.where(constant, 0.0, turned)[:, None]
    sign = torch.where(integers.amax(1) > 127, -1.0, 1.0).double()  # -128 cannot be turned around in int8
    return Channels((integers * sign[:, None]).to(torch.int8).view(weight.shape), scale.float(),
                    (shift * sign).float(), sign.float())  # fmt: skip
