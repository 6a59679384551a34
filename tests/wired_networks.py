"""Float networks of any wiring: every call reads any values that are there, and any of them may be an output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

CHANNELS = 8
One = Callable[[nn.ModuleDict, Tensor], Tensor]

# of maps `[N, 8, H, W]`, all of one size
ONE: dict[str, One] = {
    "conv": lambda own, x: own["conv"](x), "conv and norm": lambda own, x: own["norm"](own["conv"](x)),
    "norm": lambda own, x: own["norm"](x), "relu": lambda own, x: F.relu(x), "relu6": lambda own, x: F.relu6(x),
    "silu": lambda own, x: F.silu(x), "hardswish": lambda own, x: F.hardswish(x), "prelu": lambda own, x: own["prelu"](x),
    "leaky": lambda own, x: F.leaky_relu(x, 0.1), "max": lambda own, x: F.max_pool2d(x, 3, 1, 1),
    "average": lambda own, x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False), "flip": lambda own, x: x.flip(2),
    "shuffle": lambda own, x: F.channel_shuffle(x, 2), "scale": lambda own, x: 0.5 * x, "shift": lambda own, x: x + 0.25,
    "own mean": lambda own, x: x - x.mean((2, 3), keepdim=True), "own maximum": lambda own, x: x + x.amax(1, keepdim=True),
    "pad and crop": lambda own, x: F.pad(x, (1, 0, 0, 1), value=0.5)[:, :, 1:, :-1],
    "larger and back": lambda own, x: F.max_pool2d(F.interpolate(x, scale_factor=2), 2), "turned": lambda own, x: x.transpose(2, 3).transpose(2, 3),
    "bilinear": lambda own, x: F.avg_pool2d(F.interpolate(x, scale_factor=2, mode="bilinear"), 2),
    "linear": lambda own, x: own["linear"](x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
    "excite": lambda own, x: x * torch.sigmoid(own["conv"](x.mean((2, 3), keepdim=True))),
}  # fmt: skip
TWO: dict[str, Callable[[nn.ModuleDict, Tensor, Tensor], Tensor]] = {
    "add": lambda own, x, y: x + y, "subtract": lambda own, x, y: x - y, "multiply": lambda own, x, y: x * y,
    "add to sums": lambda own, x, y: own["conv"](x) + y, "join": lambda own, x, y: own["wide"](torch.cat([x, y], 1)),
    "halves": lambda own, x, y: torch.cat([y[:, :4], x[:, 4:]], 1),
    "joined norm": lambda own, x, y: F.relu(own["wide norm"](torch.cat([y, x], 1)))[:, ::2],
}  # fmt: skip


@dataclass(frozen=True)
class Wiring:
    """calls: a name of `ONE` or `TWO`, and which values it reads, counted from the last; outputs: likewise."""

    calls: tuple[tuple[str, int, int], ...]
    outputs: tuple[int, ...]
    sides: tuple[int, int]


class Wired(nn.Module):
    def __init__(self, wiring: Wiring) -> None:
        super().__init__()
        self.wiring, self.stem = wiring, nn.Conv2d(3, CHANNELS, 3, padding=1)
        self.own = nn.ModuleList(
            nn.ModuleDict(
                {
                    "conv": nn.Conv2d(CHANNELS, CHANNELS, 1),
                    "norm": nn.BatchNorm2d(CHANNELS),
                    "prelu": nn.PReLU(CHANNELS),
                    "linear": nn.Linear(CHANNELS, CHANNELS),
                    "wide": nn.Conv2d(2 * CHANNELS, CHANNELS, 1),
                    "wide norm": nn.BatchNorm2d(2 * CHANNELS),
                }
            )
            for _ in wiring.calls
        )
        self.head = nn.Linear(CHANNELS, 4)

    def forward(self, x: Tensor) -> list[Tensor]:
        values = [self.stem(x)]
        for own, (name, first, second) in zip(self.own, self.wiring.calls, strict=True):
            one, two = values[-1 - first % len(values)], values[-1 - second % len(values)]
            values.append(ONE[name](own, one) if name in ONE else TWO[name](own, one, two))
        maps = [values[-1 - index % len(values)] for index in self.wiring.outputs]
        return [self.head(values[-1].mean((2, 3))), *maps]


def wirings() -> st.SearchStrategy[Wiring]:
    call = st.tuples(st.sampled_from([*ONE, *TWO]), st.integers(0, 3), st.integers(0, 3))
    sides = st.tuples(st.integers(3, 9), st.integers(3, 9))
    outputs = st.lists(st.integers(0, 4), max_size=2).map(tuple)
    return st.builds(Wiring, st.lists(call, min_size=1, max_size=8).map(tuple), outputs, sides)


def wired(wiring: Wiring) -> nn.Module:
    """The network in evaluation mode; its batch norms have seen noise."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(2)
        model = Wired(wiring)
        with torch.no_grad():
            for _ in range(2):
                model.train()(torch.randn(4, 3, *wiring.sides))
    return model.eval()
