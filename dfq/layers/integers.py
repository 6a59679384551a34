"""What a layer asks of whoever makes an integer network of a quantized one, and index maps.

A value of the quantized network is integers of one or more values of the integer network, in some order: an index map
`[1, *shape]` says of every element where it lies. Moves change the map alone, by being carried out on it; a step is
made of them only where somebody reads the elements in an order in which they do not lie.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from dfq.engine.graph import Step
from dfq_kernels.integers import Grid


class Integers(Protocol):
    """An integer network under construction, as one layer sees it."""

    name: str  # of the layer
    shape: tuple[int, ...]  # of its result, for one image

    def operand_shape(self, index: int) -> tuple[int, ...]:
        """Of an operand, for one image."""

    def value(self, index: int, place: Callable[[Tensor], Tensor] | None = None) -> str:
        """The name of an operand's integers as a map (`dfq.engine.graph.as_map`); place: what is done to it before, as
        to a tensor `[1, *shape]`.

        Raises:
            ExportError: an operand that is not quantized.
        """

    def flat(self, index: int) -> str:
        """The same where a linear layer reads it, which flattens a map by itself."""

    def grid(self, name: str) -> Grid:
        """Of a value."""

    def weight(self) -> tuple[Tensor, Tensor, int]:
        """The layer's integer weight, output channels first, int8; its scales `[out]`; its bits."""

    def step(
        self, step: Step, made: tuple[int, int, int] | None = None, order: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        """Adds the layer's step; its activation and results are added to it.

        made: the map `(C, H, W)` that it makes; None: the layer's result as a map. order: from the map's elements, as
        a vector, to the layer's result `[1, *shape]`; None: the same elements in the same order.
        """

    def add(self, first: int, second: int, make: Callable[[str, str], Step]) -> None:
        """Adds a step of two operands of one shape, or the second spread over the first; see `Add`."""


def factored(order: Tensor, shape: tuple[int, int, int], sizes: list[tuple[int, int, int]]) -> dict[str, Any]:
    """The fields of a `Move` that gathers `order`.

    Args:
        order: int64 `[C, H * W]`, of elements of the inputs one after the other, or -1.
        shape: `(C, H, W)` of the result.
        sizes: `(C, H, W)` of the inputs.
    """
    places = [height * width for _, height, width in sizes]
    if len({size[1:] for size in sizes}) == 1:
        inside = order >= 0
        channel = torch.where(inside, order // places[0], -1)
        pixel = torch.where(inside, order % places[0], -1)
        channels, pixels = channel.amax(1), pixel.amax(0)
        both = (channels[:, None] >= 0) & (pixels[None, :] >= 0)
        product = torch.where(both, channels[:, None] * places[0] + pixels[None, :], -1)
        if torch.equal(product, order):
            same_pixels = shape[1:] == sizes[0][1:] and torch.equal(pixels, torch.arange(len(pixels)))
            count = sum(size[0] for size in sizes)
            same_channels = len(channels) == count and torch.equal(channels, torch.arange(count))
            return {
                "channels": None if same_channels else channels.to(torch.int32),
                "pixels": None if same_pixels else pixels.to(torch.int32),
            }
    return {"index": order.flatten().to(torch.int32)}
