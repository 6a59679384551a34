"""What an export must not get wrong: values with several readers, odd orders, names; graphs that are no networks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dfq.engine import Engine, IntegerGraph
from dfq.engine.check import GraphError, check_graph
from dfq.engine.fusion import fuse
from dfq.engine.graph import IMAGES, Add, AveragePool, Grid, Layer, MaxPool, Output, Quantize, Rescale
from dfq.engine.memory import plan_memory
from dfq.export import export
from dfq_kernels import extension
from tests.integer_networks import quantized


class Odd(nn.Module):
    """Layers by name, and a forward that is given."""

    def __init__(self, wiring: Callable[[Odd, Tensor], Tensor]) -> None:
        super().__init__()
        self.wiring = wiring
        self.a = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        for name in ("y", "z", "w"):
            setattr(self, name, nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)))
        self.last, self.wide = nn.BatchNorm1d(8), nn.Linear(64, 5)
        self.square, self.fc, self.head = nn.Linear(8, 8), nn.Linear(8, 5), nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.wiring(self, x)


def pool(x: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(x, 1).flatten(1)


def three(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, 1, 1)


def ends(s: Odd, *maps: Tensor) -> Tensor:
    return s.fc(pool(maps[0] + maps[1] if len(maps) == 2 else maps[0]))


WIRINGS: dict[str, Callable[[Odd, Tensor], Tensor]] = {
    "relu, then the raw value": lambda s, x: (lambda y: ends(s, s.z(F.relu(y)), s.w(y)))(s.y(s.a(x))),
    "the raw value, then relu": lambda s, x: (lambda y: ends(s, s.w(y), s.z(F.relu(y))))(s.y(s.a(x))),
    "relu and relu6": lambda s, x: (lambda y: ends(s, s.z(F.relu(y)), s.w(F.relu6(y))))(s.y(s.a(x))),
    "relu and a pool": lambda s, x: (lambda y: ends(s, s.z(F.relu(y)), s.w(three(y))))(s.y(s.a(x))),
    "a sum, its relu and itself": lambda s, x: (lambda a: (lambda t: ends(s, s.z(F.relu(t)), s.w(t)))(s.y(a) + a))(
        s.a(x)
    ),
    "relu behind a pool": lambda s, x: ends(s, s.z(F.relu(three(s.y(s.a(x)))))),
    "two pools": lambda s, x: ends(s, s.z(three(three(s.y(s.a(x)))))),
    "a sum behind a pool": lambda s, x: (lambda a: ends(s, three(s.y(a)), a))(s.a(x)),
    "a linear layer and its input": lambda s, x: (lambda p: s.fc(F.relu(s.square(p) + p)))(pool(s.a(x))),
    "logits of a convolution": lambda s, x: F.adaptive_avg_pool2d(s.head(s.a(x)), 1).flatten(1),
    "relu of logits": lambda s, x: F.relu(s.fc(pool(s.a(x)))),
    "a window larger than the map": lambda s, x: ends(s, F.max_pool2d(F.avg_pool2d(s.a(x), 4), 3, 2, ceil_mode=True)),
    "a batch norm's logits": lambda s, x: s.last(pool(s.a(x))),
    "an adaptive pool larger than its map": lambda s, x: ends(s, F.adaptive_avg_pool2d(s.a(x), 15)),
    "relu6 behind relu": lambda s, x: ends(s, F.relu6(s.a(x))),
    "a linear layer on [N, C, L]": lambda s, x: s.wide(s.a(x).flatten(2)).mean(1),
    "relu of the image": lambda s, x: ends(s, s.z(s.a(F.relu(x)))),
}


@pytest.mark.parametrize("name", WIRINGS)
def test_odd_wirings_are_the_trained_graph(name: str) -> None:
    torch.manual_seed(0)
    model = quantized(Odd(WIRINGS[name]).eval(), (3, 8, 8), "W4A4")
    graph = export(model)
    images = torch.randn(6, 3, 8, 8)
    with torch.no_grad():
        expected = model(images)
    assert torch.equal(Engine(graph, backend="reference")(images), expected)
    if extension.missing("cpu") is None:
        assert torch.equal(Engine(graph, backend="native")(images), expected)


class Names(nn.Module):
    """Submodules with the names of the graph's own values."""

    def __init__(self) -> None:
        super().__init__()
        self.images, self.norm = nn.Conv2d(3, 8, 3, padding="same"), nn.BatchNorm2d(8)
        self.logits = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return pool(self.logits(torch.relu(self.norm(self.images(x)))))


def test_names_of_modules_do_not_collide() -> None:
    torch.manual_seed(0)
    model = quantized(Names().eval(), (3, 6, 6), "W8A8")
    images = torch.randn(3, 3, 6, 6)
    with torch.no_grad():
        assert torch.equal(Engine(export(model))(images), model(images))


def test_a_sum_of_a_map_and_its_mean() -> None:
    torch.manual_seed(0)
    wiring = lambda s, x: (lambda a: ends(s, a, F.adaptive_avg_pool2d(s.y(a), 1)))(s.a(x))  # noqa: E731
    model, images = quantized(Odd(wiring).eval(), (3, 8, 8), "W4A4"), torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(Engine(export(model))(images), model(images))


# --- graphs of files that are no networks -------------------------------------------------------------------------

GRID = Grid(0.1, 3, 0, 15)
ONES = torch.ones(4, 8, dtype=torch.int8)


def layer(outs: tuple[str, ...] = ("logits",), weight: Tensor = ONES, **geometry: object) -> Layer:
    count = len(weight)
    return Layer("q", outs, None, "l", weight, 4, torch.ones(count), torch.zeros(count), None, **geometry)  # type: ignore[arg-type]


def graph(shape: tuple[int, int, int], *steps: object, **grids: Grid) -> IntegerGraph:
    first = Quantize(IMAGES, ("q",), None)
    return IntegerGraph(shape, {"q": GRID, **grids}, (first, *steps), (Output("logits", (4,)),))  # type: ignore[arg-type]


BAD = {
    "geometry of a linear layer": (graph((8, 1, 1), layer(groups=0)), "geometry must be none of a linear layer"),
    "padding of a linear layer": (graph((8, 1, 1), layer(padding=(3, 3))), "geometry must be none of a linear layer"),
    "images on a grid": (
        graph((4, 1, 1), Add("q", ("logits",), None, "images"), images=GRID), "images must be without"),
    "logits and integers": (graph((8, 1, 1), layer(("a", "logits")), a=GRID), "must be on grids, or a real one alone"),
    "sums of a pool": (graph((4, 20000, 20000), AveragePool("q", ("logits",), None)), "largest sum must be below 2"),
    "a window beside the map": (
        graph((4, 3, 3), MaxPool("q", ("a",), None, (2, 2), (1, 1), (1, 1), (4, 4)),
              AveragePool("a", ("logits",), None), a=GRID), "every window must be one that meets the map"),
    "padding of an adaptive pool": (
        graph((4, 3, 3), AveragePool("q", ("logits",), None, padding=(1,))), "geometry must be none of an adaptive"),
    "a layer without a name": (graph((8, 1, 1), Layer("q", ("logits",), None, {}, ONES, 4, torch.ones(4),  # type: ignore[arg-type]
                                                      torch.zeros(4), None)), "name must be text"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_graphs_that_are_no_networks_are_refused(name: str) -> None:
    wrong, text = BAD[name]
    with pytest.raises(GraphError, match=text):
        check_graph(wrong)


def test_an_arena_without_end_is_refused() -> None:
    far = layer(("a",), torch.ones(1, 1, 1, 1, dtype=torch.int8), stride=(65536, 65536), padding=(65536, 65536))
    steps = Quantize(IMAGES, ("q",), None), far, AveragePool("a", ("logits",), None)
    wide = IntegerGraph((1, 1, 1), {"q": GRID, "a": GRID}, steps, (Output("logits", (1,)),))
    with pytest.raises(GraphError, match="the memory of one image must be at most 4294967232 bytes, got 6"):
        shapes = check_graph(wide)
        plan_memory(wide, fuse(wide, shapes), shapes)


def test_logits_of_a_rescale_step_are_written() -> None:
    made = graph((4, 1, 1), Rescale("q", ("logits",), None))
    images = torch.randn(2, 4, 1, 1)
    expected = Engine(made, backend="reference")(images)
    if extension.missing("cpu") is None:
        assert torch.equal(Engine(made, backend="native")(images), expected)
    assert len(fuse(made, check_graph(made))) == 2
