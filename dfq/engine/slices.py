"""Moves that move nothing: a concatenation whose inputs are written into their slices, a slice read in place."""

from __future__ import annotations

import torch
from torch import Tensor

from dfq.engine.graph import IntegerGraph, Move, as_map
from dfq.engine.rules import Shape


class Slices:
    """In whose plane every value lies, and from which channel on.

    A value that is neither concatenated nor cut out lies in a plane of its own. Channels of a plane belong to one
    value, and to others only where these are the same integers, so that nobody writes over anything.

    Args:
        graph: checked.
        shapes: of `check_graph`.
    """

    def __init__(self, graph: IntegerGraph, shapes: dict[str, Shape]) -> None:
        self._channels = {name: as_map(shape)[0] for name, shape in shapes.items()}
        self._parent: dict[str, tuple[str, int]] = {}
        moves = [step for step in graph.steps if isinstance(step, Move) and step.index is None and step.pixels is None]
        for move in moves:
            self._cut(move)
        for move in reversed(moves):  # the largest of nested concatenations comes last
            self._join(move)

    def of(self, name: str) -> tuple[str, int]:
        """The value in whose plane it lies, and its first channel there."""
        first = 0
        while name in self._parent:
            name, more = self._parent[name]
            first += more
        return name, first

    def _cut(self, move: Move) -> None:
        """Neighbouring channels of one input lie in its plane."""
        start = self._start(move.channels, move.shape[0])
        for name in (move.x, *move.others):
            if start >= 0 and start + move.shape[0] <= self._channels[name]:
                self._parent[move.outs[0]] = name, start
                return
            start -= self._channels[name]

    def _join(self, move: Move) -> None:
        """Whole inputs, one after the other: they lie in the result's plane, or it lies where they are already."""
        names, (out,) = (move.x, *move.others), move.outs
        whole = sum(self._channels[name] for name in names) == move.shape[0]
        if not whole or len(names) < 2 or self._start(move.channels, move.shape[0]) != 0:
            return
        found = [self.of(name) for name in names]
        root, first = found[0]
        if out not in self._parent and root not in names and self._follow(names, root, first):
            self._parent[out] = root, first
            return
        root, first = self.of(out)[0], 0
        for name in names:
            if name not in self._parent and name != root and names.count(name) == 1:
                self._parent[name] = out, first
            first += self._channels[name]

    def _follow(self, names: tuple[str, ...], root: str, first: int) -> bool:
        """Whether values lie one behind the other in a plane."""
        for name in names:
            if self.of(name) != (root, first):
                return False
            first += self._channels[name]
        return True

    @staticmethod
    def _start(channels: Tensor | None, count: int) -> int:
        """The first of channels that follow one another, else -1."""
        if channels is None:
            return 0
        start = int(channels[0])
        return start if start >= 0 and torch.equal(channels.long(), torch.arange(start, start + count)) else -1
