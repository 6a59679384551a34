"""Finds launch configurations of the Triton kernels on this GPU: `make tune`.

Every kind of kernel (`tiles.tuning()`) is timed in captured graphs over the sides of its tiles and its warps, on
operators and sizes of `benchmarks.run` and on layers of networks; the fastest by geometric mean goes to
`dfq_kernels/tuning/<architecture>.json`.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from typing import Any

import torch
from triton.runtime.errors import OutOfResources

from benchmarks.baselines import Row, resnet18_weights, rows
from benchmarks.run import LAYOUTS, SHAPES, backward_of
from benchmarks.timing import PER_GRAPH, captured, interleaved
from dfq.running.checkpoint import write_atomic
from dfq_kernels import Grid, fake_quant_weights, int_conv2d, pack_weight, quantize, requantize, tiles

CHOICES = {"elements": (512, 1024, 2048, 4096, 8192), "warps": (4, 8, 16), "channels": (64, 128)}
CONVOLUTION = {"pixels": (64, 128), "channels": (64, 128), "depth": (64, 128), "warps": (4, 8), "stages": (3, 4)}
LAYERS = ((128, 16, 32), (128, 64, 8), (32, 64, 56), (32, 256, 14))  # images, channels, side
# the operators that show a kind of kernel best
SHOWN_BY = {
    "elementwise": ("fake_quant", "bn_act_fake_quant"),
    "reduction": ("bn_stats", "bn_act_stats", "observe_fake_quant"),
    "finish": ("bn_stats",),
}


def workloads(kind: str, device: torch.device) -> list[Callable[[], object]]:
    """Calls whose time depends on this kind of kernel: forward with backward, so that a graph can capture both."""
    if kind in ("pixels", "convolution"):
        return [call for layer in LAYERS for bits in (8, 4) for call in _integers(kind, *layer, bits, device)]
    if kind == "row":
        layers = resnet18_weights(device)
        return [lambda: fake_quant_weights(layers, 4, backend="triton")]
    chosen: list[Row] = [row for row in rows(device) if row.op in SHOWN_BY[kind]]
    inputs = [
        torch.randn(shape, device=device).contiguous(memory_format=layout)
        for shape in SHAPES["cuda"][1:3]
        for layout in LAYOUTS.values()
    ]
    return [backward_of(lambda t, row=row: row.ours(t, "triton"), x, again=True) for row in chosen for x in inputs]


def _integers(
    kind: str, images: int, channels: int, side: int, bits: int, device: torch.device
) -> list[Callable[[], object]]:
    """A layer of products of tiles; or a rescaling and a depthwise layer."""
    grid, ones = Grid(0.1, 0, 0, 2**bits - 1), torch.ones(channels, device=device)
    settings: dict[str, Any] = {"packed": True, "backend": "triton"}
    x = quantize(torch.rand(images, channels, side, side, device=device), grid, **settings)
    inner = channels if kind == "convolution" else 1
    weight = pack_weight(torch.ones(channels, inner, 3, 3, dtype=torch.int8), bits).to(device)
    groups = channels // inner
    calls: list[Callable[[], object]] = [
        lambda: int_conv2d(x, weight, ones, ones, grid, padding=1, groups=groups, activation="relu", **settings)
    ]
    return calls if kind == "convolution" else [*calls, lambda: requantize(x, grid, other=x, **settings)]


def seconds(kind: str, device: torch.device) -> float:
    """The geometric mean over the workloads."""
    try:
        return _mean(kind, device)
    except OutOfResources:  # this GPU has less shared memory or fewer registers
        return math.inf


def _mean(kind: str, device: torch.device) -> float:
    times = [
        interleaved({"it": captured(call)}, seconds=0.05, calls=PER_GRAPH)["it"].median
        for call in workloads(kind, device)
    ]
    return math.exp(sum(math.log(time) for time in times) / len(times))


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("tune: a GPU must be there, got none that torch sees")
    device, chosen = torch.device("cuda"), tiles.tuning()  # changed in place: kernels read it at every launch
    for kind, default in chosen.items():
        found, choices = {}, CONVOLUTION if kind == "convolution" else CHOICES
        for sides in itertools.product(*[choices[key] for key in default]):
            default.update(zip(default, sides, strict=True))
            found[sides] = seconds(kind, device)
            print(f"{kind}: {default}: {found[sides] * 1e6:.1f} us", flush=True)
        default.update(zip(default, min(found, key=lambda key: found[key]), strict=True))
    write_atomic(tiles.FOLDER / f"{tiles.architecture()}.json", (json.dumps(chosen, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
