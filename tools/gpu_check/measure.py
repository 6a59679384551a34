"""Measurements, alone on the machine, what says most first: `python -m tools.gpu_check.measure WHAT --rows FILE ...`.

WHAT is `engine`, `steps`, `layers` or `operators`. Rows of a benchmark carry its name as `benchmark`, so that
`python -m tools.gpu_check --collect OUT` makes result files of them; the first row has the machine.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch

from benchmarks import end_to_end, integer, layers, run, timing
from benchmarks.baselines import rows
from benchmarks.machine import machine_line
from benchmarks.outcome import Red
from tools.gpu_check.notes import Notes, arguments
from tools.gpu_check.place import Place, place

PRESETS = integer.PRESETS
FP16 = "torch fp16 captured"


def ceilings(on: Place) -> dict[str, float]:
    """What this machine reaches: copy, int8 and fp16 products, one node of a graph."""
    size, side = on.pick(2**28, 2**10), on.pick(8192, 64)
    big, other = torch.randn(size, device=on.device), torch.empty(size, device=on.device)
    whole = torch.randint(-127, 127, (side, side), device=on.device, dtype=torch.int8)
    half = torch.randn(side, side, device=on.device, dtype=torch.half)
    tiny, nodes = torch.zeros(32, device=on.device).add_(1), on.pick(1000, 3)

    def many() -> list[torch.Tensor]:
        return [tiny.add_(1) for _ in range(nodes)]

    replay, _ = on.capture(many)
    products = 2 * side**3
    return {"copy_tbs": 8 * size / on.microseconds(lambda: other.copy_(big), 20) / 1e6,
            "int8_tops": products / on.microseconds(lambda: torch._int_mm(whole, whole.t()), 20) / 1e6,
            "fp16_tflops": products / on.microseconds(lambda: half @ half, 20) / 1e6,
            "us_per_graph_node": on.microseconds(replay, 5) / nodes}  # fmt: skip


def kernels(on: Place, call: Callable[[], object], count: int) -> dict[str, Any]:
    """Microseconds and launches of each kernel in one call."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU if on.dry else ProfilerActivity.CUDA]) as seen:
        for _ in range(count):
            call()
        on.synchronize()
    field = "self_cpu_time_total" if on.dry else "self_device_time_total"
    found = [(float(getattr(event, field)), event.count, event.key) for event in seen.key_averages()]
    ordered = sorted((item for item in found if item[0] > 0), reverse=True)
    total, launches = (sum(item[column] for item in ordered) for column in (0, 1))
    return {"us": round(total / count, 1), "launches": launches / count,
            "top": [[round(time / count, 1), n / count, key[:60]] for time, n, key in ordered[:14]]}  # fmt: skip


def engine(on: Place, notes: Notes) -> None:
    """Images per second against fp16 in a captured graph; what a replay is made of."""
    notes.section("ceilings", lambda: ceilings(on))
    torch.backends.cudnn.benchmark = True
    name = "wrn-16-1"
    model, shape = on.model(name)
    ours = {preset: on.network(integer.integers(model, shape, preset)) for preset in PRESETS}
    half = copy.deepcopy(model).to(on.device, torch.float16, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def at(batch: int) -> None:
        images = torch.randn(batch, *shape, device=on.device)
        own = images.half().contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            graph, logits = timing.record(lambda: half(own))

        def fp16(x: torch.Tensor) -> torch.Tensor:
            own.copy_(x)
            with torch.no_grad():
                graph.replay()
            out = logits.clone()
            on.synchronize()
            return out

        calls = {f"{integer.OURS} {preset}": network for preset, (network, _) in ours.items()} | {FP16: fp16}
        for call in calls.values():
            for _ in range(5):
                call(images)
        count = on.pick(10, 1)
        repeated = {key: integer.repeated(call, images, count) for key, call in calls.items()}
        times = timing.interleaved(repeated, seconds=on.pick(2.0, 0), least=on.pick(9, 1), calls=count)
        rates = {key: round(batch / value.median, 1) for key, value in times.items()}
        ratio = round(rates[f"{integer.OURS} W8A8"] / rates[FP16], 2)
        notes.note(benchmark="integer", row={
            "model": name, "size": shape[1], "batch": batch, "images_per_second": rates, "strongest": FP16,
            "times_strongest": ratio,
        })  # fmt: skip
        replays = {preset: execution._recorded[batch].replay for preset, (_, execution) in ours.items()}
        replays["fp16"] = graph.replay
        notes.note(replay_us={key: round(on.microseconds(call), 1) for key, call in replays.items()}, batch=batch,
                   call_us={key: round(value.median * 1e6, 1) for key, value in times.items()})  # fmt: skip
        for key in ("W8A8", "W4A4", "fp16"):
            notes.note(kernels=key, batch=batch, **kernels(on, replays[key], on.pick(5, 1)))

    for batch in on.pick((1, 1024, 128), (1,)):
        notes.section(f"batch {batch}", partial(at, batch))


def steps(on: Place, notes: Notes) -> None:
    """A training step as it is, captured, and torch.ao's; what the captured one is made of."""
    small = end_to_end.Workload("wrn-10-1", 8, 2)
    real = [end_to_end.Workload(batch=256), end_to_end.Workload(batch=256, precision="fp32"),
            end_to_end.Workload("resnet18", 224, 64)]  # fmt: skip

    def at(work: end_to_end.Workload) -> None:
        calls = end_to_end.variants(work, on.device, compiled=False)
        for row in end_to_end.measured(work, calls, on.device, on.pick(5.0, 0.0)):
            notes.note(benchmark="steps", row=row)
        last = list(calls)[-1] if on.dry else "dfq-kernels captured"
        notes.note(kernels=last, model=work.model, precision=work.precision, **kernels(on, calls[last], on.pick(3, 1)))

    for work in on.pick(real, [small]):
        notes.section(f"{work.model} {work.precision}", partial(at, work))


def one_layer(on: Place, notes: Notes, layer: layers.Layer, batch: int) -> None:
    try:
        row = layers.measure(layer, batch, on.device, on.pick(0.1, 0.0), as_on_gpu=True)
    except Red as red:
        row = {"layer": list(layer), "batch": batch, "red": str(red)}
    notes.note(benchmark="layers", row=row)


def all_layers(on: Place, notes: Notes) -> None:
    """Convolutions of integers against fp16, those of the benchmarked networks first."""
    listed = layers.LAYERS
    real = [(layer, batch) for batch in (256, 64) for layer in listed[1:4] + listed[7:] + listed[:1] + listed[4:7]]
    for layer, batch in on.pick(real, [(layers.Layer(4, 4, 4), 1)]):
        notes.section(f"{layer} {batch}", partial(one_layer, on, notes, layer, batch))


def operators(on: Place, notes: Notes) -> None:
    """Every operator against torch's own calls and the ceilings."""
    sizes = run.SHAPES["cuda"]
    shapes = on.pick((sizes[0], sizes[2], sizes[1], sizes[3]), ((2, 4, 4, 4),))
    layouts, types = on.pick((("channels_last", "contiguous"), ("bf16", "fp32")), (("channels_last",), ("fp32",)))
    for shape, layout, dtype in product(shapes, layouts, types):
        x = torch.randn(shape, device=on.device).to(run.DTYPES[dtype]).contiguous(memory_format=run.LAYOUTS[layout])

        def at(row: Any, x: torch.Tensor = x, **what: Any) -> None:
            for found in run.measure(row, x, on.pick(0.05, 0.0), False, as_on_gpu=True):
                notes.note(benchmark="kernels", row={**found, **what})

        for row in rows(on.device):
            call = partial(at, row, shape=list(shape), layout=layout, dtype=dtype)
            notes.section(f"{row.op} {row.name} {shape} {layout} {dtype}", call)


PARTS = {"engine": engine, "steps": steps, "layers": all_layers, "operators": operators}

if __name__ == "__main__":
    options, notes = arguments(__doc__, "what")
    here = place(options.dry)
    notes.note(machine=machine_line())
    with here.timing():
        PARTS[options.what](here, notes)
    notes.end()
