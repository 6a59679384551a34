"""The only stopwatch: variants interleaved in one process, medians."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch

T = TypeVar("T")
# calls in one captured graph: a small kernel takes a few microseconds, no more than a replay's own beginning and end
PER_GRAPH, PER_GRAPH_LARGE = 50, 10
LARGE = 2**26  # bytes of a call's tensor


@dataclass(frozen=True)
class Seconds:
    """Of one call: the median and the best of all rounds."""

    median: float
    best: float


def interleaved(
    variants: Mapping[str, Callable[[], object]],
    *,
    seconds: float = 1.0,
    least: int = 15,
    calls: int = 1,
    pause: float = 0.0,
) -> dict[str, Seconds]:
    """Seconds of a call of each variant; every round runs each once, so that noise meets all of them.

    In an order that is drawn for every round: what the call before has left in the caches costs up to a fifth.

    Args:
        variants: what to call, by name; a result is dropped before the next call.
        seconds: how long to go on, once every variant has run `least` times.
        calls: how many calls of what is measured one call of a variant makes.
        pause: seconds before each call, where another library's threads go on spinning after theirs; a call that is
            not measured follows it and wakes the variant's own.
    """
    times: dict[str, list[float]] = {name: [] for name in variants}
    for call in variants.values():
        call()
    order, began = random.Random(0), time.perf_counter()
    while time.perf_counter() - began < seconds or len(next(iter(times.values()))) < least:
        for name, call in order.sample(list(variants.items()), len(variants)):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if pause:
                time.sleep(pause)
                call()
            start = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[name].append((time.perf_counter() - start) / calls)
    return {name: Seconds(statistics.median(values), min(values)) for name, values in times.items()}


def per_graph(size: int) -> int:
    """How many calls on a tensor of `size` bytes one graph captures."""
    return PER_GRAPH_LARGE if size >= LARGE else PER_GRAPH


def captured(call: Callable[[], object], count: int = PER_GRAPH) -> Callable[[], object]:
    """The replay of a CUDA graph of `count` calls.

    Raises:
        RuntimeError: the call cannot be captured.
    """
    graph, _ = record(call, count)
    return graph.replay


def record(call: Callable[[], T], count: int = 1) -> tuple[torch.cuda.CUDAGraph, T]:
    """A CUDA graph of `count` calls, and what the last of them gives at every replay."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(count):
            result = call()
    return graph, result
