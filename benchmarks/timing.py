"""The only stopwatch: variants interleaved in one process, medians."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping

import torch


def interleaved(
    variants: Mapping[str, Callable[[], object]], *, seconds: float = 1.0, least: int = 15
) -> dict[str, float]:
    """Median seconds of a call of each variant; every round runs each once, so that noise meets all of them.

    In an order that is drawn for every round: what the call before has left in the caches costs up to a fifth.

    Args:
        variants: what to call, by name; a result is dropped before the next call.
        seconds: how long to go on, once every variant has run `least` times.
    """
    times: dict[str, list[float]] = {name: [] for name in variants}
    for call in variants.values():
        call()
    order, began = random.Random(0), time.perf_counter()
    while time.perf_counter() - began < seconds or len(next(iter(times.values()))) < least:
        for name, call in order.sample(list(variants.items()), len(variants)):
            start = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}
