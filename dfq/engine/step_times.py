"""How long each step of an integer network takes on this CPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from dfq.engine.graph import IntegerGraph
from dfq.engine.native import NativeNetwork
from dfq.errors import check
from dfq_kernels import extension

SECONDS = 1.0  # for all steps together
FEWEST = 5  # calls of each


def timed(found: dict[str, Any], graph: IntegerGraph, seconds: float = SECONDS) -> dict[str, Any]:
    """Facts of `dfq.engine.inspect.facts` with times: `milliseconds` of the network and of every row of `sequence`.

    A step is timed alone, again and again, for one image, so that what it reads is in the caches. A row with None runs
    in the registers of the row that `runs_with` names, and its time is in that one's.

    Raises:
        ValueError: the native module is not there.
    """
    reason = extension.missing("cpu")
    check("inspect", "picture", reason, "of a network whose steps the native module can time", reason is None)
    network = NativeNetwork(graph)
    image = torch.zeros(1, *graph.input_shape)
    threads = torch.get_num_threads()
    reals = [torch.empty(network.shapes[name]) for name in network.reals]
    addresses = [real.data_ptr() for real in reals]
    times: dict[str, float] = {}
    leaders: dict[str, str] = {}
    for group in network.groups:
        runner = network.runner_of([group])
        arguments = image.data_ptr(), 1, addresses, threads, False
        times[group.step.outs[0]] = _median(lambda: runner.run(*arguments), seconds / len(network.groups))  # noqa: B023
        leaders |= {step.outs[0]: group.step.outs[0] for step in group.chained}
    rows = [
        row | {"milliseconds": times.get(row["makes"][0]), "runs_with": leaders.get(row["makes"][0])}
        for row in found["sequence"]
    ]
    whole = _median(lambda: network(image), seconds / 4)
    return found | {"sequence": rows, "milliseconds": whole, "threads": threads}


def _median(call: Callable[[], Any], seconds: float) -> float:
    """Milliseconds."""
    call()
    times, began = list[float](), time.perf_counter()
    while len(times) < FEWEST or time.perf_counter() - began < seconds:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1e3 * median(times)
