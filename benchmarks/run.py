"""Operators against the strongest alternative and the measured ceiling: `python -m benchmarks.run [--out FILE]`.

Alternatives: torch's own calls, `torch.compile` of the reference. Ceilings, measured in the same rounds: the copy of
a tensor of the same size (output allocated) and a sum (a read). A kernel that does not equal the reference is not
measured (red conformance: no numbers), and one that is faster than its compulsory traffic has no number either: such
rows are red and say why, the run goes on and ends with 1. On a GPU every variant is a captured CUDA graph, where it can
be captured.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dfq_kernels as k
from benchmarks.baselines import Row, resnet18_weights, rows, torch_weights
from benchmarks.machine import results_file
from benchmarks.outcome import finish
from benchmarks.timing import Seconds, captured, interleaved, per_graph
from dfq.cli.app import keep_freed_memory
from dfq_kernels.bn_stats import native as bn_stats
from dfq_kernels.dispatch import missing
from dfq_kernels.fake_quant import native as fake_quant
from dfq_kernels.specs import all_specs

SHAPES = {
    "cpu": ((128, 16, 32, 32), (128, 32, 16, 16), (32, 64, 56, 56)),
    "cuda": ((256, 16, 32, 32), (256, 64, 8, 8), (64, 64, 56, 56), (64, 256, 56, 56)),
}
SPECS = all_specs()
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def fresh(row: Row, device: torch.device) -> Row:
    """The same row with ranges and stored statistics of its own, which operators update in place."""
    (same,) = [item for item in rows(device) if (item.op, item.name) == (row.op, row.name)]
    return same


def conforms(row: Row, x: Tensor, backend: str) -> bool:
    """Whether the backend gives what the reference gives on this tensor."""

    def first(name: str) -> Tensor:
        result = fresh(row, x.device).ours(x, name)
        return (result if isinstance(result, Tensor) else result[0]).float()

    found, expected = first(backend), first("reference")
    # one step of the range: a statistic in another order may round a value to its neighbour
    step = 2.02 * float(expected.max() - expected.min()) / 255  # a ReLU leaves half of the range
    off, resolution = (found - expected).abs(), torch.finfo(x.dtype).eps * float(expected.abs().max())
    return bool((off <= max(1e-5, resolution)).float().mean() > 0.999) and bool((off <= step + resolution).all())


def backward_of(forward: Callable[[Tensor], Any], x: Tensor, *, again: bool = False) -> Callable[[], object]:
    """A call that goes back through one recorded forward; with `again` through a new one every time."""
    leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()

    def recorded() -> list[Tensor]:
        outs = forward(leaf)
        return [out for out in (outs if isinstance(outs, tuple) else (outs,)) if out.requires_grad]

    outs = recorded()
    grads = [torch.randn_like(out) for out in outs]
    if again:
        return lambda: torch.autograd.grad(recorded(), leaf, grads)
    return lambda: torch.autograd.grad(outs, leaf, grads, retain_graph=True)


Pass = tuple[str, float, tuple[int, int], dict[str, Callable[[], object]]]


def passes(row: Row, x: Tensor, calls: dict[str, Callable[[Tensor], Any]], graphs: bool) -> Iterator[Pass]:
    """`(name, bytes moved, tensors read and written at least, variants)`.

    Backward alone on a CPU. On a GPU with its forward: autograd runs on the forward's stream, so that a graph can only
    capture both.
    """
    (forward, backward), (reads, writes) = SPECS[row.op].bytes_moved({"x": x}, dict(row.settings)), row.backward_least
    yield "forward", forward, row.forward_least, {key: lambda call=call: call(x) for key, call in calls.items()}
    if graphs:
        least = row.forward_least[0] + reads, row.forward_least[1] + writes
        both = {key: backward_of(call, x, again=True) for key, call in calls.items()}
        yield "forward and backward", forward + backward, least, both
    else:
        yield "backward", backward, (reads, writes), {key: backward_of(call, x) for key, call in calls.items()}


def timed(
    variants: dict[str, Callable[[], object]], seconds: float, count: int
) -> tuple[dict[str, Seconds], list[str]]:
    """Times, and which variants could not be captured: these are timed as they are.

    count: calls in one graph; 0 captures none.
    """
    if not count:
        return interleaved(variants, seconds=seconds), []
    graphs, eager = {}, {}
    for name, call in variants.items():
        try:
            graphs[name] = captured(call, count)
        except RuntimeError:
            eager[name] = call
    times = interleaved(graphs, seconds=seconds, calls=count)
    return times | (interleaved(eager, seconds=seconds) if eager else {}), list(eager)


def in_cache(x: Tensor) -> bool:
    """Whether a GPU may hold the tensor and a copy of it in its L2, some of it at least."""
    return x.is_cuda and x.nbytes <= torch.cuda.get_device_properties(x.device).L2_cache_size


def least_seconds(reads: int, writes: int, copy: float, read: float, cached: bool) -> float:
    """What a kernel that reads and writes so many tensors must take, from the times of a copy and of a sum of one.

    In a GPU's L2 neither is a ceiling of every byte: the sum leaves the cache idle, and a launch costs as much as the
    bytes. There only whole kernels compare: it must take half as long as a copy, or as half a copy if it only reads.
    """
    if cached:
        return 0.5 * copy if writes else 0.25 * copy
    # torch's copy reads what it overwrites; a kernel that writes past the caches does not
    return 0.95 * (writes * min(copy, 2 * read) + (reads - writes) * read)


def conforming(row: Row, x: Tensor, names: tuple[str, ...]) -> tuple[list[str], list[dict[str, Any]]]:
    """The backends that may be measured, and a red row for each other one."""
    good, red = [], []
    for backend in names:
        reason = missing(row.op, backend, x.device.type)
        if reason is None and not conforms(row, x, backend):
            reason = f"{row.op} {backend} must equal the reference before it is measured"
        if reason is None:
            good.append(backend)
        else:
            red.append({"op": row.op, "case": row.name, "backend": backend, "red": reason})
    return good, red


def measure(
    row: Row, x: Tensor, seconds: float, compiled: bool, *, as_on_gpu: bool | None = None
) -> list[dict[str, Any]]:
    """Forward and backward of one operator on one tensor; `us` is of the first backend that is there.

    as_on_gpu: Triton too, all in graphs; None: where x is.
    """
    graphs = x.is_cuda if as_on_gpu is None else as_on_gpu
    backends, results = conforming(row, x, ("native", "triton") if graphs else ("native",))
    if not backends:
        return results
    mine, again = {name: fresh(row, x.device) for name in backends}, fresh(row, x.device)
    calls: dict[str, Callable[[Tensor], Any]] = {
        name: lambda t, name=name: mine[name].ours(t, name) for name in backends
    }
    calls["torch"] = row.theirs
    if compiled:
        torch.compiler.reset()
        calls["compiled"] = torch.compile(lambda t: again.ours(t, "reference"), dynamic=False)
    ceilings = {"copy": x.clone, "read": x.sum}
    for name, bytes_moved, (reads, writes), variants in passes(row, x, calls, graphs):
        times, eager = timed({**variants, **ceilings}, seconds, per_graph(x.nbytes) if graphs else 0)
        found, alternatives = times[backends[0]], {key: times[key] for key in calls if key != backends[0]}
        head = {"op": row.op, "case": row.name, "pass": name, "backend": backends[0]}
        least = least_seconds(reads, writes, times["copy"].best, times["read"].best, in_cache(x))
        if found.median < least:
            rule = f"at least {least * 1e6:.1f} us for its traffic, got {found.median * 1e6:.1f}"
            results.append({**head, "red": f"{row.op} {name} must take {rule}"})
            continue
        results.append({
            **head, "us": round(found.median * 1e6, 1),
            **{f"{key}_us": round(value.median * 1e6, 1) for key, value in alternatives.items()},
            **{f"times_{key}": round(value.median / found.median, 2) for key, value in alternatives.items()},
            "gbps": round(bytes_moved / found.median / 1e9, 1),
            "of_copy": round(bytes_moved / (2 * x.nbytes) * times["copy"].median / found.median, 3),
            **({"eager": eager} if eager else {}),
        })  # fmt: skip
    return results


def weights(device: torch.device, seconds: float) -> dict[str, Any]:
    """All layers of ResNet-18 in one call."""
    if (reason := missing("fake_quant_weights", "native", device.type)) is not None:
        return {"op": "fake_quant_weights", "case": "ResNet-18", "pass": "forward", "red": reason}
    layers = resnet18_weights(device)
    times, _ = timed(
        {"native": lambda: k.fake_quant_weights(layers, 4, backend="native"), "torch": lambda: torch_weights(layers),
         "copy": lambda: [layer.clone() for layer in layers]}, seconds, per_graph(0) if device.type == "cuda" else 0,
    )  # fmt: skip
    mine = times["native"].median
    return {"op": "fake_quant_weights", "case": "ResNet-18", "pass": "forward", "us": round(mine * 1e6, 1),
            "torch_us": round(times["torch"].median * 1e6, 1), "times_torch": round(times["torch"].median / mine, 2),
            "of_copy": round(times["copy"].median / mine, 3)}  # fmt: skip


def small(device: torch.device, seconds: float) -> dict[str, Any]:
    """The public function on 4,096 elements, from Python to its result: alone, and recorded for a backward."""
    x, scale, zero_point = torch.randn(4096, device=device), torch.tensor(0.1), torch.tensor(0.0)
    leaf, scale, zero_point = x.clone().requires_grad_(), scale.to(device), zero_point.to(device)
    times = interleaved(
        {"plain": lambda: k.fake_quant(x, scale, zero_point),
         "recorded": lambda: k.fake_quant(leaf, scale, zero_point)},
        seconds=seconds, least=2000,
    )  # fmt: skip
    return {"op": "fake_quant", "case": "4,096 elements", "us": round(times["plain"].median * 1e6, 2),
            "recorded_us": round(times["recorded"].median * 1e6, 2)}  # fmt: skip


def without_autograd(x: Tensor, seconds: float) -> list[dict[str, Any]]:
    """Two operators as a kernel's caller sees them: outputs allocated, no checks and no graph, against torch's own."""
    if (reason := missing("fake_quant", "native", x.device.type)) is not None:
        return [{"op": "fake_quant", "case": "without autograd", "red": reason}]
    scale, zero_point = torch.tensor(0.1, device=x.device), torch.zeros((), device=x.device)
    _, bits = fake_quant.forward(x, scale, zero_point, 0, 255, None)
    whole, on = torch.zeros(1, dtype=torch.int32, device=x.device), torch.ones(1, device=x.device)
    _, mask = torch.ops.aten._fake_quantize_per_tensor_affine_cachemask_tensor_qparams(x, scale, whole, on, 0, 255)
    theirs_backward = torch.ops.aten.fake_quantize_per_tensor_affine_cachemask_backward
    pairs: dict[tuple[str, str], tuple[Callable[[], object], Callable[[], object]]] = {
        ("fake_quant", "backward"): (
            lambda: fake_quant.backward(x, bits, x.stride()), lambda: theirs_backward(x, mask),
        ),
        ("bn_stats", "forward"): (
            lambda: bn_stats.forward(x), lambda: torch.var_mean(x, (0, 2, 3), unbiased=False),
        ),
    }  # fmt: skip
    results = []
    for (op, name), (mine, theirs) in pairs.items():
        count = per_graph(x.nbytes) if x.is_cuda else 0
        times, _ = timed({"native": mine, "torch": theirs, "copy": x.clone}, seconds, count)
        found = times["native"].median
        results.append({
            "op": op, "case": "without autograd", "pass": name, "us": round(found * 1e6, 1),
            "torch_us": round(times["torch"].median * 1e6, 1), "times_torch": round(times["torch"].median / found, 2),
            "of_copy": round((1 if op == "fake_quant" else 0.5) * times["copy"].median / found, 3),
        })  # fmt: skip
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, help="a JSON file for the results; default: one of this machine's name")
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement")
    parser.add_argument("--compiled", action="store_true", help="also torch.compile of the reference: minutes more")
    arguments = parser.parse_args()
    keep_freed_memory()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results: list[dict[str, Any]] = []
    for dtype_name, dtype in DTYPES.items():
        for shape in SHAPES[device.type]:
            for layout, memory_format in LAYOUTS.items():
                values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
                x = values.to(device, dtype).contiguous(memory_format=memory_format)
                for row in rows(device):
                    for result in measure(row, x, arguments.seconds, arguments.compiled):
                        results.append({**result, "shape": list(shape), "dtype": dtype_name, "layout": layout})
                        print(json.dumps(results[-1]), flush=True)
                for result in without_autograd(x, arguments.seconds) if dtype == torch.float32 else []:
                    results.append({**result, "shape": list(shape), "dtype": dtype_name, "layout": layout})
                    print(json.dumps(results[-1]), flush=True)
    for more in (weights, small):
        results.append(more(device, arguments.seconds))
        print(json.dumps(results[-1]), flush=True)
    finish(arguments.out or results_file("kernels"), results)


if __name__ == "__main__":
    main()
