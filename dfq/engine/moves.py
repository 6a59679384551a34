"""Moves of integers as torch's indexing: what a graph of operators has no kernel for and needs none."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dfq.engine.graph import Move
from dfq_kernels.integers import Grid, QuantizedTensor, channels_last, pack_channels, storage_width, unpack_channels


class Placement:
    """A move, its indices on the device; bytes in their places, fields of bytes apart and together again.

    Args:
        step: a move.
        grid: of its result, and of all that it reads.
        device: where it runs.
    """

    def __init__(self, step: Move, grid: Grid, device: torch.device) -> None:
        self.step, self.grid = step, grid
        self.channels, self.pixels, self.index = (
            None if places is None else _Places(places, device) for places in (step.channels, step.pixels, step.index)
        )

    def __call__(self, inputs: Sequence[QuantizedTensor], packed: bool) -> QuantizedTensor:
        """The result, of inputs `[N, C, H, W]`."""
        maps = [unpack_channels(x.q, x.bits, self.grid.signed) for x in inputs]
        shape = (len(maps[0]), *self.step.shape)
        if self.index is not None:
            flat = torch.cat([q.flatten(1) for q in maps], 1)
            q = self.index.of(flat, 1, self.step.fill).reshape(shape)
        else:
            q = torch.cat(maps, 1) if len(maps) > 1 else maps[0]
            if self.channels is not None:
                q = self.channels.of(q, 1, self.step.fill)
            if self.pixels is not None:
                q = self.pixels.of(q.flatten(2), 2, self.step.fill).reshape(shape)
        bits = storage_width(self.grid.bits, shape[1]) if packed else 8
        return QuantizedTensor(channels_last(pack_channels(q, bits)), self.grid, bits)


class _Places:
    """Indices along one axis: a slice where they follow one another."""

    def __init__(self, places: Tensor, device: torch.device) -> None:
        first, count = int(places[0]), len(places)
        self.run = (
            (first, count) if first >= 0 and torch.equal(places.long(), torch.arange(first, first + count)) else None
        )
        self.places = places.clamp(min=0).long().to(device)
        self.absent = (places < 0).to(device) if bool((places < 0).any()) else None

    def of(self, q: Tensor, axis: int, fill: int) -> Tensor:
        """Those elements of an axis; `fill` where there is none."""
        if self.run is not None:
            return q.narrow(axis, *self.run)
        found = q.index_select(axis, self.places)
        if self.absent is None:
            return found
        return found.masked_fill(self.absent.view(-1, *[1] * (found.dim() - 1 - axis)), fill)
