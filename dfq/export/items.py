"""What a node of a quantized network is in the integer network that is being made of it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dfq.engine.graph import Step
from dfq.layers.kind import per_channel
from dfq.quant.quantizers import FIXED, ActivationQuantizer, WeightQuantizer
from dfq_kernels.integers import Grid


class ExportError(ValueError):
    """A quantized network that is no integer network."""


@dataclass(eq=False)
class Open:
    """A step under construction: what it makes may still be added to it. made: the map `(C, H, W)` of its result."""

    step: Step
    made: tuple[int, int, int]
    outs: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Item:
    """A value: elements of steps' raw results, or of named integers.

    shape: for one image. order: float64 `[1, *shape]`, of every element its place among those of the bases, one base
    after the other, or -1 for `fill`; None: of the only base, in the order in which they lie. function: what an output
    goes through (`dfq.engine.graph.Output`), and along which axis.
    """

    bases: tuple[Open | str, ...]
    shape: tuple[int, ...]
    order: Tensor | None = None
    fill: float = 0.0
    function: tuple[str, int] | None = None

    @property
    def quantized(self) -> bool:
        return all(isinstance(base, str) for base in self.bases)

    @property
    def padded(self) -> bool:
        return self.order is not None and bool((self.order < 0).any())

    def places(self) -> Tensor:
        """`order`, whatever it is."""
        if self.order is not None:
            return self.order
        count = 1
        for side in self.shape:
            count *= side
        return torch.arange(count, dtype=torch.float64).view(1, *self.shape)


def check_fixed(model: nn.Module) -> None:
    """Whether every range stays where it is.

    Raises:
        ExportError: one that still follows the batches, or is a parameter.
    """
    for name, module in model.named_modules():
        if isinstance(module, ActivationQuantizer) and module.source != FIXED:
            how = "dfq.calibrate, or dfq.quant.freeze_ranges after training"
            raise ExportError(f"export: the model must have fixed ranges ({how}), got a {module.source} one of {name}")


def grid_of(quantizer: ActivationQuantizer) -> Grid:
    """The grid of its range."""
    return Grid(float(quantizer.scale), int(quantizer.zero_point), quantizer.quant_min, quantizer.quant_max)


def integer_weight(name: str, quantizer: WeightQuantizer, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The integers of a layer's weight, output channels first, and their scales `[out]`.

    Raises:
        ExportError: they have zero points.
    """
    if float(quantizer.zero_point.abs().max()) != 0:
        raise ExportError(f"export: weights of {name} must be symmetric, got zero points (weight_scheme='affine')")
    out, scale = quantizer(weight)
    return torch.round(out / per_channel(scale, out, 0)), scale


def joined(items: list[Item], size: dict[Open | str, int]) -> tuple[tuple[Open | str, ...], list[Tensor]]:
    """The bases of several items as those of one, each once, and the items' index maps into them."""
    bases: list[Open | str] = []
    for item in items:
        bases += [base for base in item.bases if base not in bases]
    begins, total = dict[Open | str, int](), 0
    for base in bases:
        begins[base], total = total, total + size[base]
    return tuple(bases), [_shifted(item, begins, size) for item in items]


def _shifted(item: Item, begins: dict[Open | str, int], size: dict[Open | str, int]) -> Tensor:
    """An item's index map, counted from where its bases begin now."""
    places, begin, ends, shifts = item.places(), 0, [], []
    for base in item.bases:
        shifts.append(begins[base] - begin)
        begin += size[base]
        ends.append(begin)
    if len(set(shifts)) == 1:
        return places if shifts[0] == 0 else torch.where(places >= 0, places + shifts[0], places)
    part = torch.bucketize(places, torch.tensor(ends, dtype=places.dtype), right=True).clamp(max=len(ends) - 1)
    return torch.where(places >= 0, places + torch.tensor(shifts, dtype=places.dtype)[part], places)


def in_order(order: Tensor) -> bool:
    """Whether a map is that of elements as they lie."""
    return torch.equal(order.reshape(-1), torch.arange(order.numel(), dtype=order.dtype))
