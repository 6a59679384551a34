"""Finds launch configurations of the Triton kernels on this GPU: `make tune`.

Every kind of kernel (`tiles.tuning()`) is timed in captured graphs over tile sizes and warps, on operators and sizes
of `benchmarks.run`; the fastest by geometric mean goes to `dfq_kernels/tuning/<architecture>.json`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import torch

from benchmarks.baselines import Row, resnet18_weights, rows
from benchmarks.run import LAYOUTS, SHAPES, backward_of
from benchmarks.timing import captured, interleaved
from dfq.checkpoint import write_atomic
from dfq_kernels import fake_quant_weights, tiles

ELEMENTS = (512, 1024, 2048, 4096, 8192)
WARPS = (4, 8, 16)
# the operators that show a kind of kernel best
SHOWN_BY = {
    "elementwise": ("fake_quant", "bn_act_fake_quant"),
    "reduction": ("bn_stats", "bn_act_stats", "observe_fake_quant"),
    "finish": ("bn_stats",),
}


def workloads(kind: str, device: torch.device) -> list[Callable[[], object]]:
    """Calls whose time depends on this kind of kernel: forward with backward, so that a graph can capture both."""
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


def seconds(kind: str, device: torch.device) -> float:
    """The geometric mean over the workloads."""
    times = [interleaved({"it": captured(call)}, seconds=0.05)["it"].median for call in workloads(kind, device)]
    return math.exp(sum(math.log(time) for time in times) / len(times))


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("tune: a GPU must be there, got none that torch sees")
    device, chosen = torch.device("cuda"), tiles.tuning()  # changed in place: kernels read it at every launch
    for kind, default in chosen.items():
        found = {}
        for elements in ELEMENTS:
            for warps in WARPS:
                default.update(elements=elements, warps=warps)
                found[elements, warps] = seconds(kind, device)
                print(f"{kind}: {elements} elements, {warps} warps: {found[elements, warps] * 1e6:.1f} us", flush=True)
        elements, warps = min(found, key=lambda key: found[key])
        default.update(elements=elements, warps=warps)
    write_atomic(tiles.FOLDER / f"{tiles.architecture()}.json", (json.dumps(chosen, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
