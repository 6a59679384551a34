"""Operators against torch's own calls and the measured ceiling: `python -m benchmarks.run [--out FILE] [--seconds S]`.

The ceiling is the copy of a tensor of the same size, output allocated, measured in the same rounds. A kernel is not
measured unless it equals the reference (red conformance: no numbers), and a rate above 105 % of the ceiling fails.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dfq_kernels as k
from benchmarks.baselines import Row, resnet18_weights, rows, torch_weights
from benchmarks.machine import machine_line
from benchmarks.timing import interleaved
from dfq.checkpoint import write_atomic
from dfq.cli import keep_freed_memory

SHAPES = ((128, 16, 32, 32), (128, 32, 16, 16), (32, 64, 56, 56))
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def conforms(row: Row, x: Tensor, backend: str) -> bool:
    """Whether the backend gives what the reference gives on this tensor, each from a range that is its own."""

    def first(name: str) -> Tensor:
        (fresh,) = [item for item in rows() if (item.op, item.name) == (row.op, row.name)]
        result = fresh.ours(x, name)
        return result if isinstance(result, Tensor) else result[0]

    found, expected = first(backend), first("reference")
    # one step of the range: a statistic in another order may round a value to its neighbour
    step = 2.02 * float(expected.max() - expected.min()) / 255  # a ReLU leaves half of the range
    off = (found - expected).abs()
    return bool((off <= 1e-5).float().mean() > 0.999) and bool((off <= step).all())


def backward_of(forward: Callable[[Tensor], Any], x: Tensor) -> Callable[[], object]:
    """A call that goes back through one recorded forward."""
    leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
    outs = forward(leaf)
    outs = [out for out in (outs if isinstance(outs, tuple) else (outs,)) if out.requires_grad]
    grads = [torch.randn_like(out) for out in outs]
    return lambda: torch.autograd.grad(outs, leaf, grads, retain_graph=True)


def measure(row: Row, x: Tensor, seconds: float) -> list[dict[str, Any]]:
    """Forward and backward of one operator on one tensor."""
    if not conforms(row, x, "native"):
        raise SystemExit(f"benchmarks: {row.op} must equal the reference before it is measured")
    ours, size = lambda t: row.ours(t, "native"), x.numel() * x.element_size()
    passes: list[tuple[str, float, Callable[[], object], Callable[[], object]]] = [
        ("forward", row.forward_tensors, lambda: ours(x), lambda: row.theirs(x)),
        ("backward", row.backward_tensors, backward_of(ours, x), backward_of(row.theirs, x)),
    ]
    results = []
    for name, tensors, mine, theirs in passes:
        times = interleaved({"native": mine, "torch": theirs, "copy": lambda: x.clone()}, seconds=seconds)
        rate, ceiling = tensors * size / times["native"], 2 * size / times["copy"]
        results.append({
            "op": row.op, "case": row.name, "pass": name, "shape": list(x.shape), "dtype": "float32",
            "us": round(times["native"] * 1e6, 1), "torch_us": round(times["torch"] * 1e6, 1),
            "times_torch": round(times["torch"] / times["native"], 2),
            "gbps": round(rate / 1e9, 1), "of_copy": round(rate / ceiling, 3),
        })  # fmt: skip
    return results


def weights(seconds: float) -> dict[str, Any]:
    """All layers of ResNet-18 in one call."""
    layers = resnet18_weights()
    times = interleaved(
        {"native": lambda: k.fake_quant_weights(layers, 4, backend="native"), "torch": lambda: torch_weights(layers),
         "copy": lambda: [layer.clone() for layer in layers]}, seconds=seconds,
    )  # fmt: skip
    return {"op": "fake_quant_weights", "case": "ResNet-18", "pass": "forward", "us": round(times["native"] * 1e6, 1),
            "torch_us": round(times["torch"] * 1e6, 1), "times_torch": round(times["torch"] / times["native"], 2),
            "of_copy": round(times["copy"] / times["native"], 3)}  # fmt: skip


def small(seconds: float) -> dict[str, Any]:
    """The public function on 4,096 elements, from Python to its result."""
    x, scale = torch.randn(4096), torch.tensor(0.1)
    leaf = x.clone().requires_grad_()
    times = interleaved(
        {"plain": lambda: k.fake_quant(x, scale, 0.0), "recorded": lambda: k.fake_quant(leaf, scale, 0.0)},
        seconds=seconds, least=2000,
    )  # fmt: skip
    return {"op": "fake_quant", "case": "4096 elements", "us": round(times["plain"] * 1e6, 2),
            "recorded_us": round(times["recorded"] * 1e6, 2)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement")
    arguments = parser.parse_args()
    keep_freed_memory()
    results: list[dict[str, Any]] = []
    for shape in SHAPES:
        for layout, memory_format in LAYOUTS.items():
            x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).contiguous(memory_format=memory_format)
            for row in rows():
                for result in measure(row, x, arguments.seconds):
                    results.append({**result, "layout": layout})
                    print(json.dumps(results[-1]), flush=True)
    results += [weights(arguments.seconds), small(arguments.seconds)]
    print("\n".join(json.dumps(result) for result in results[-2:]))
    if arguments.out:
        data = {"machine": machine_line(), "rows": results}
        write_atomic(arguments.out, (json.dumps(data, indent=1) + "\n").encode())
    if too_fast := [row for row in results if row.get("of_copy", 0) > 1.05]:
        raise SystemExit(f"benchmarks: a rate must be at most 105 % of the ceiling, got {too_fast[0]}")


if __name__ == "__main__":
    main()
