"""The integer engine on a GPU against the CPU's, bit by bit, until it is captured and beyond.

`python -m tools.gpu_check.engine_bits NETWORK PRESET BATCHES --rows FILE --stage NAME [--dry]`; batches by commas.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.integer import integers
from dfq.engine import Engine
from dfq.running.execution import WARM_UP, Execution
from tools.gpu_check.notes import arguments
from tools.gpu_check.place import Place, place

CALLS = WARM_UP + 3  # the last three are the capture and two replays


def compare(
    on: Place, found: Callable[[Tensor], Tensor], expected: Engine, execution: Execution, shape: tuple[int, ...]
) -> dict[str, Any]:
    """Logits of a batch, `CALLS` times, of other images every time."""
    equal = []
    for _ in range(CALLS):
        images = torch.randn(shape)
        equal.append(bool(torch.equal(found(images.to(on.device)).cpu(), expected(images))))
    captured = shape[0] in execution.recorded
    if not all(equal) or not captured:
        raise AssertionError(f"batch {shape[0]}: equal {equal}, captured {captured}")
    return {"batch": shape[0], "equal": len(equal), "cpu": expected.backend}


if __name__ == "__main__":
    options, notes = arguments(__doc__, "network", "preset", "batches")
    here = place(options.dry)
    torch.manual_seed(0)
    model, shape = here.model(options.network)
    graph = integers(model, shape, options.preset)
    on_gpu, execution = here.network(graph)
    on_cpu = Engine(graph, "cpu")
    for batch in map(int, here.pick(options.batches, "2").split(",")):
        name = f"{options.network} {options.preset} {batch}"
        notes.section(name, lambda n=batch: compare(here, on_gpu, on_cpu, execution, (n, *shape)))
    notes.end()
