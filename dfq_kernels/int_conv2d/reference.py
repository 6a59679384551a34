"""Integer convolution in plain PyTorch: sums in float64, exact below 2^53."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from dfq_kernels.integers import Epilogue, unflat, unpack_channels
from dfq_kernels.quantize import reference as quantize


def forward(
    x: Tensor, x_grid: list[float], weight: Tensor, sums: Tensor, weight_bits: int, mult: Tensor, bias: Tensor,
    stride: list[int], padding: list[int], dilation: list[int], groups: int, residual: Tensor | None,
    residual_grid: list[float], *epilogue: object,
) -> list[Tensor]:  # fmt: skip
    """`t = float(acc) * mult[c] + bias[c] + float(r - z_r) * s_r`, and what every operator ends with."""
    grid, bits = unflat(x_grid)
    whole = unpack_channels(x, bits, grid.signed).double() - grid.zero_point
    factors = unpack_channels(weight, weight_bits, signed=True).double()
    acc = F.conv2d(whole, factors, None, stride, padding, dilation, groups).round()
    t = acc.float() * quantize.per_channel(mult, acc) + quantize.per_channel(bias, acc)
    if residual is not None:
        grid, bits = unflat(residual_grid)
        t = t + quantize.real(unpack_channels(residual, bits, grid.signed), grid)
    return quantize.finish(t, Epilogue.of(*epilogue))  # type: ignore[arg-type]
