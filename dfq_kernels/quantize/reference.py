"""Rounding to grids in plain PyTorch: what `quantize` does, and what every integer operator ends with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dfq_kernels.activations import activation_of
from dfq_kernels.integers import Constants, Epilogue, Grid, allocate, fp32_of, pack_channels

SIXTH = fp32_of(1 / 6)


def forward(x: Tensor, *epilogue: object) -> list[Tensor]:
    """Activation and rounding of real numbers."""
    t = torch.where(x.isnan(), 0, x.float())  # whoever wants no NaN has looked for it
    return finish(t, Epilogue.of(*epilogue))  # type: ignore[arg-type]


def finish(t: Tensor, epilogue: Epilogue) -> list[Tensor]:
    """Activation, rounding to every result's grid, and what follows the first of them; or t itself."""
    results = allocate(t, t.shape, epilogue)
    t = activate(t, epilogue.activation)
    if not epilogue.outs:
        results[0].copy_(t)
        return results
    values = [rounded(t, grid) for grid in epilogue.outs]
    if epilogue.then is not None:
        t = meant(values[0], epilogue.outs[0], epilogue.then.constants)
        t = activate(t, epilogue.then.activation)
        values += [rounded(t, grid) for grid in epilogue.then.outs]
    for result, q, (_, bits) in zip(results, values, epilogue.results, strict=True):
        result.copy_(pack_channels(q, bits))
    return results


def rounded(t: Tensor, grid: Grid) -> Tensor:
    """`clamp(rne(t * (1 / scale) + zero_point), quant_min, quant_max)`."""
    q = (t * grid.inverse + grid.zero_point).round().clamp(grid.quant_min, grid.quant_max)
    return q.to(torch.int8 if grid.signed else torch.uint8)


def real(q: Tensor, grid: Grid) -> Tensor:
    """`(q - zero_point) * scale`, fp32."""
    return (q.float() - grid.zero_point) * grid.scale


def meant(q: Tensor, grid: Grid, constants: Sequence[Tensor | None]) -> Tensor:
    """What integers stand for, with all of `Constants`; one beyond the grid is read from its table's end."""
    given = Constants(*constants)
    if given.table is not None:
        return given.table.float()[(q.long() - grid.quant_min).clamp(0, grid.levels - 1)]
    t = normalized(real(q, grid), *given.norm)
    return t if given.slope is None else torch.where(t > 0, t, per_channel(given.slope, t) * t)


def normalized(t: Tensor, *norm: Tensor) -> Tensor:
    """`(t - mean[c]) * mult[c] + bias[c]`, where there is a batch norm."""
    if not norm:
        return t
    mean, mult, bias = (per_channel(vector, t) for vector in norm)
    return (t - mean) * mult + bias


def activate(t: Tensor, activation: str | None) -> Tensor:
    """One of `dfq_kernels.activations`, every operation rounded on its own."""
    known = activation_of(activation)
    if known.bounds is not None:
        return t if known.name is None else t.clamp(*known.bounds)
    if known.name == "leaky_relu":
        return torch.where(t > 0, t, t * known.a)
    gate = (t + 3).clamp(0, 6) * SIXTH
    return gate if known.name == "hardsigmoid" else t * gate


def per_channel(vector: Tensor, t: Tensor) -> Tensor:
    """A number per channel, shaped to meet `[N, C, ...]`."""
    return vector.float().reshape(1, -1, *[1] * (t.dim() - 2))
