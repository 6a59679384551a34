"""The integer graph in plain PyTorch: the oracle. Integers in int64, sums in float64 (exact below 2^53)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dfq.engine.graph import (
    IMAGES,
    Add,
    AveragePool,
    Grid,
    IntegerGraph,
    Layer,
    MaxPool,
    Quantize,
    Rescale,
    Step,
    windows,
)


@torch.no_grad()
def run(graph: IntegerGraph, images: Tensor) -> dict[str, Tensor]:
    """Every value of the network: int64 integers, and the logits.

    Args:
        images: `[N, C, H, W]`, normalised as the teacher's; float32.

    Raises:
        ValueError: images that hold NaN.
    """
    if bool(images.isnan().any()):
        raise ValueError("engine: images must be numbers, got NaN")
    values = {IMAGES: images.float()}
    for step in graph.steps:
        if isinstance(step, MaxPool):
            window = step.kernel, step.stride, step.padding, step.dilation, step.ceil_mode
            values[step.outs[0]] = F.max_pool2d(values[step.x].double(), *window).long()
            continue
        total = _TOTALS[type(step)](step, graph, values)  # type: ignore[operator]
        total = _activate(total, step.activation)
        for out in step.outs:
            values[out] = _round(total, graph.grids[out]) if out in graph.grids else total.flatten(1)
    return values


def _whole(name: str, graph: IntegerGraph, values: dict[str, Tensor]) -> Tensor:
    """`q - zero_point` as float64."""
    return (values[name] - graph.grids[name].zero_point).double()


def _real(name: str, graph: IntegerGraph, values: dict[str, Tensor]) -> Tensor:
    """`(q - zero_point) * scale` in fp32."""
    return _whole(name, graph, values).float() * graph.grids[name].scale


def _round(t: Tensor, grid: Grid) -> Tensor:
    inverse = 1 / torch.tensor(grid.scale, device=t.device)
    return (t * inverse + grid.zero_point).round().clamp(grid.quant_min, grid.quant_max).long()


def _activate(t: Tensor, activation: str | None) -> Tensor:
    if activation == "relu":
        return t.relu()
    return t.clamp(0, 6) if activation == "relu6" else t


def _channels(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(1, -1, *[1] * (like.dim() - 2))


def _quantize(step: Quantize, graph: IntegerGraph, values: dict[str, Tensor]) -> Tensor:
    return values[step.x]


def _layer(step: Layer, graph: IntegerGraph, values: dict[str, Tensor]) -> Tensor:
    x, weight = _whole(step.x, graph, values), step.weight.double()
    if weight.dim() == 2:
        acc = F.linear(x.flatten(1), weight)
    else:
        acc = F.conv2d(x, weight, None, step.stride, step.padding, step.dilation, step.groups)
    t = acc.round().float() * _channels(step.mult, acc) + _channels(step.bias, acc)
    return t if step.residual is None else t + _real(step.residual, graph, values).reshape(t.shape)


def _rescale(step: Rescale, graph: IntegerGraph, values: dict[str, Tensor]) -> Tensor:
    t = _real(step.x, graph, values)
    if step.mean is None or step.mult is None or step.bias is None:
        return t
    return (t - _channels(step.mean, t)) * _channels(step.mult, t) + _channels(step.bias, t)


def _add(step: Add, graph: IntegerGraph, values: dict[str, Tensor]) -> Tensor:
    x = _real(step.x, graph, values)
    return x + _real(step.other, graph, values).reshape(x.shape)


def _average_pool(step: AveragePool, graph: IntegerGraph, values: dict[str, Tensor]) -> Tensor:
    x = _whole(step.x, graph, values)
    scale = torch.tensor(graph.grids[step.x].scale, device=x.device)
    if step.kernel is not None:
        count = float(step.kernel[0] * step.kernel[1])
        total = F.avg_pool2d(x, step.kernel, step.stride, step.padding) * count
        return total.round().float() * (scale / count)
    rows, columns = (windows(size, parts) for size, parts in zip(x.shape[2:], step.output, strict=True))
    sums = [torch.stack([x[:, :, top:bottom, left:right].sum((2, 3)) for left, right in columns], 2)
            for top, bottom in rows]  # fmt: skip
    counts = [[float((bottom - top) * (right - left)) for left, right in columns] for top, bottom in rows]
    return torch.stack(sums, 2).float() * (scale / torch.tensor(counts, device=x.device))


_TOTALS: dict[type[Step], object] = {
    Quantize: _quantize, Layer: _layer, Rescale: _rescale, Add: _add, AveragePool: _average_pool,
}  # fmt: skip
