"""Triton kernels over many layers in one launch: addresses and sizes travel in the launch's arguments, as tuples.

So a captured CUDA graph holds them, and no table in memory has to outlive it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import triton
import triton.language as tl

LAYERS = 48  # of one launch: with six addresses a layer they fit the 4,096 bytes that any GPU takes


def chunks(layers: Sequence[Any]) -> Iterator[Sequence[Any]]:
    """The layers, as many at once as one launch takes."""
    for first in range(0, len(layers), LAYERS):
        yield layers[first : first + LAYERS]


@triton.jit
def of_layer(values, layer):
    """The layer's entry of a tuple; `layer` may be a block of numbers."""
    chosen = tl.where(layer == 0, values[0], values[0])
    for index in tl.static_range(1, len(values)):
        chosen = tl.where(layer == index, values[index], chosen)
    return chosen


@triton.jit
def find_layer(ends, place):
    """Which layer a place of all layers' places belongs to, and where it begins; ends: of each layer, in order."""
    layer, begin = 0, 0
    for index in tl.static_range(len(ends) - 1):
        behind = place >= ends[index]
        layer = tl.where(behind, index + 1, layer)
        begin = tl.where(behind, ends[index], begin)
    return layer, begin
