"""Rounding to grids in plain PyTorch: what `quantize` does, and what every integer operator ends with."""

from __future__ import annotations

import torch
from torch import Tensor

from dfq_kernels.integers import Epilogue, Grid, allocate, pack_channels


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
        t = normalized(real(values[0], epilogue.outs[0]), *epilogue.then.norm)
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


def normalized(t: Tensor, *norm: Tensor) -> Tensor:
    """`(t - mean[c]) * mult[c] + bias[c]`, where there is a batch norm."""
    if not norm:
        return t
    mean, mult, bias = (per_channel(vector, t) for vector in norm)
    return (t - mean) * mult + bias


def activate(t: Tensor, activation: str | None) -> Tensor:
    if activation == "relu":
        return t.relu()
    if activation == "relu6":
        return t.clamp(0, 6)
    if activation is not None:
        raise ValueError(f"activation must be None, relu or relu6, got {activation!r}")
    return t


def per_channel(vector: Tensor, t: Tensor) -> Tensor:
    """A number per channel, shaped to meet `[N, C, ...]`."""
    return vector.float().reshape(1, -1, *[1] * (t.dim() - 2))
