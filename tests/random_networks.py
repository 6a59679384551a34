"""Integer networks of any shape, drawn by hypothesis: every kind of step, in any order, read more than once."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from dfq.engine.graph import (
    IMAGES,
    Add,
    AveragePool,
    Grid,
    IntegerGraph,
    Layer,
    MaxPool,
    Move,
    Multiply,
    Output,
    Quantize,
    Rescale,
    Resize,
    Step,
    Table,
    as_map,
)
from dfq_kernels.int_pool.schema import out_sides
from tests.bilinear import places

ACTIVATIONS = (
    None, "relu", "relu6", "hardtanh(-1.5,0.7)", "hardtanh(-inf,1.0)", "leaky_relu(0.1)", "leaky_relu(-0.5)",
    "hardsigmoid", "hardswish",
)  # fmt: skip
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu, "sigmoid": torch.sigmoid, "tanh": torch.tanh, "gelu": F.gelu,
    "gelu_tanh": lambda t: F.gelu(t, approximate="tanh"), "elu": F.elu, "selu": F.selu, "softplus": F.softplus,
    "mish": F.mish, "hardswish": F.hardswish, "hardsigmoid": F.hardsigmoid, "square": torch.square,
}  # fmt: skip
MOST_CHANNELS, MOST_PIXELS = 80, 400  # of a value that is made larger
Shape = tuple[int, int, int]


@st.composite
def networks(draw) -> IntegerGraph:
    """An image, one to six steps of any kind, a linear layer, and results of other values beside it."""
    net = _Network(draw)
    for _ in range(draw(st.integers(1, 6))):
        kind = draw(st.sampled_from(sorted(_KINDS)))
        _KINDS[kind](net)
    return net.ended()


def fp32(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float32))


class _Network:
    """A network as it grows. Values are taken for maps; `vectors` are those that are none."""

    def __init__(self, draw: Callable[..., Any]) -> None:
        self.draw, self.random = draw, torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
        self.grids: dict[str, Grid] = {}
        self.shapes: dict[str, Shape] = {}
        self.vectors: set[str] = set()
        self.steps: list[Step] = []
        channels = draw(st.sampled_from([1, 2, 3, 4, 7, 8, 16, 17, 24, 36]))
        image = channels, draw(st.integers(1, 11)), draw(st.integers(1, 19))
        self.input_shape = draw(st.sampled_from([image] * 6 + [image[:1], image[:2], (1, 2, *image[1:])]))
        outs = self.outs(draw(st.integers(1, 2)))
        self.add(Quantize(IMAGES, outs, self.activation()), as_map(self.input_shape))

    # --- values -------------------------------------------------------------------------------------------------

    def grid(self) -> Grid:
        """A new one, or one that there is: moves read values of one grid."""
        if self.grids and self.draw(st.booleans()):
            return self.draw(st.sampled_from(sorted(self.grids.values(), key=repr)))
        bits = self.draw(st.sampled_from([2, 4, 5, 8]))
        low = self.draw(st.sampled_from([0, -(2 ** (bits - 1))]))
        high = low + 2**bits - 1
        scale = fp32(self.draw(st.floats(0.01, 2.0)))
        return Grid(scale, self.draw(st.sampled_from([low, high, low + 1])), low, high)

    def outs(self, count: int = 1, on: Grid | None = None) -> tuple[str, ...]:
        names = tuple(f"v{len(self.grids) + index}" for index in range(count))
        for name in names:
            self.grids[name] = on or self.grid()
        return names

    def add(self, step: Step, shape: Shape, vector: bool = False) -> str:
        """The step's first result, which is what comes next."""
        self.steps.append(step)
        self.shapes |= dict.fromkeys(step.outs, shape)
        self.vectors |= set(step.outs) if vector else set()
        self.current = step.outs[0]
        return self.current

    def value(self) -> str:
        """The latest, or now and then any."""
        names = [self.current] * 4 + sorted(self.grids.keys() & self.shapes.keys())
        return self.draw(st.sampled_from(names))

    def map(self) -> str:
        """A value that is no vector."""
        x = self.value()
        if x not in self.vectors:
            return x
        return next(name for name in self.grids if name not in self.vectors)

    def activation(self) -> str | None:
        return self.draw(st.sampled_from(ACTIVATIONS))

    def numbers(self, count: int, scale: float = 1.0) -> Tensor:
        return torch.randn(count, generator=self.random) * scale

    def rescaled(self, x: str, on: Grid) -> str:
        """x on a grid."""
        if self.grids[x] == on:
            return x
        return self.add(Rescale(x, self.outs(on=on), None), self.shapes[x], x in self.vectors)

    def weight(self, shape: tuple[int, ...]) -> tuple[Tensor, int]:
        bits = self.draw(st.sampled_from([2, 4, 8]))
        half = 2 ** (bits - 1)
        return torch.randint(-half, half, shape, generator=self.random).to(torch.int8), bits

    # --- steps --------------------------------------------------------------------------------------------------

    def convolution(self) -> None:
        x = self.map()
        channels, *sides = self.shapes[x]
        kind = self.draw(st.sampled_from(["dense", "depthwise", "groups"]))
        divisors = [count for count in range(1, channels + 1) if channels % count == 0]
        groups = {"dense": 1, "depthwise": channels, "groups": self.draw(st.sampled_from(divisors))}[kind]
        out = channels if kind == "depthwise" else groups * self.draw(st.sampled_from([1, 2, 5, 16, 33]))
        out = out if out <= 4 * MOST_CHANNELS else groups
        padding, dilation = self.pair(0, 2), self.pair(1, 2)
        room = [min(5, (side + 2 * p - 1) // d + 1) for side, p, d in zip(sides, padding, dilation, strict=True)]
        kernel = self.draw(st.integers(1, max(1, room[0]))), self.draw(st.integers(1, max(1, room[1])))
        stride = self.pair(1, 3)
        weight, bits = self.weight((out, channels // groups, *kernel))
        mult = torch.rand(out, generator=self.random) * 2.0 ** self.draw(st.integers(-14, -2))
        shape = (out, *out_sides(sides, kernel, stride, padding, dilation, False))
        same = [name for name in self.shapes if self.shapes[name] == shape]
        residual = self.draw(st.sampled_from(same)) if same and self.draw(st.booleans()) else None
        layer = Layer(x, self.outs(self.draw(st.integers(1, 2))), self.activation(), f"conv{len(self.steps)}", weight,
                      bits, mult, self.numbers(out), residual, stride, padding, dilation, groups)  # fmt: skip
        self.add(layer, shape)

    def linear(self) -> None:
        """Also a vector that something is added to."""
        x = self.value()
        size, out = math.prod(self.shapes[x]), self.draw(st.sampled_from([self.shapes[x][0], 6]))
        same = [name for name in self.shapes if self.shapes[name] == (out, 1, 1)]
        residual = self.draw(st.sampled_from(same)) if same and self.draw(st.booleans()) else None
        weight, bits = self.weight((out, size))
        layer = Layer(x, self.outs(), self.activation(), f"linear{len(self.steps)}", weight, bits,
                      self.numbers(out, 2 / size), self.numbers(out), residual)  # fmt: skip
        self.add(layer, (out, 1, 1), vector=True)

    def rescale(self) -> None:
        x = self.value()
        channels = self.shapes[x][0]
        norm = [self.numbers(channels) if self.draw(st.booleans()) else None] * 3
        norm = [None if item is None else self.numbers(channels) for item in norm]
        slope = self.numbers(channels) if self.draw(st.booleans()) else None
        step = Rescale(x, self.outs(self.draw(st.integers(1, 2))), self.activation(), *norm, slope=slope)
        self.add(step, self.shapes[x], x in self.vectors)

    def table(self) -> None:
        x = self.value()
        values, function = self.function(self.grids[x])
        step = Table(x, self.outs(self.draw(st.integers(1, 2))), self.activation(), values, function)
        self.add(step, self.shapes[x], x in self.vectors)

    def function(self, grid: Grid) -> tuple[Tensor, str]:
        """A known function's values, or any numbers."""
        function = self.draw(st.sampled_from([*FUNCTIONS, ""]))
        q = torch.arange(grid.quant_min, grid.quant_max + 1).double()
        if function:
            return FUNCTIONS[function]((q - grid.zero_point) * grid.scale).float(), function
        return self.numbers(grid.levels, 3.0), function

    def pair_of_values(self) -> tuple[str, str]:
        """x, and what may be added to it: itself, another of its shape, a vector, one channel."""
        x = self.value()
        channels, height, width = self.shapes[x]
        fits = ((channels, height, width), (channels, 1, 1), (1, height, width))
        others = [name for name in self.shapes if self.shapes[name] in fits]
        kind = self.draw(st.sampled_from(["known", "vector", "pixel", "channel"]))
        if kind in ("vector", "pixel"):
            mean = self.add(AveragePool(self.map_of(x), self.outs(), None), (channels, 1, 1))
            if kind == "pixel":
                return x, mean
            weight, bits = self.weight((channels, channels))
            layer = Layer(mean, self.outs(), self.activation(), f"gate{len(self.steps)}", weight, bits,
                          self.numbers(channels, 0.1), self.numbers(channels), None)  # fmt: skip
            return x, self.add(layer, (channels, 1, 1), vector=True)
        if kind == "channel":
            weight, bits = self.weight((1, channels, 1, 1))
            layer = Layer(self.map_of(x), self.outs(), None, f"gate{len(self.steps)}", weight, bits,
                          self.numbers(1, 0.1), self.numbers(1), None)  # fmt: skip
            return x, self.add(layer, (1, height, width))
        return x, self.draw(st.sampled_from(others))

    def map_of(self, x: str) -> str:
        """x, which convolutions and pools read as a map."""
        if x not in self.vectors:
            return x
        return self.add(Move(x, self.outs(on=self.grids[x]), None, self.shapes[x]), self.shapes[x])

    def add_values(self) -> None:
        x, other = self.pair_of_values()
        self.add(Add(x, self.outs(), self.activation(), other), self.shapes[x], x in self.vectors)

    def multiply(self) -> None:
        x, other = self.pair_of_values()
        scale = fp32(self.grids[x].scale * self.grids[other].scale)
        step = Multiply(x, self.outs(self.draw(st.integers(1, 2))), self.activation(), other, scale)
        self.add(step, self.shapes[x], x in self.vectors)

    def pool(self) -> None:
        x = self.map()
        channels, *sides = self.shapes[x]
        padding = self.pair(0, 1)
        kernel = tuple(self.draw(st.integers(max(1, 2 * p), max(1, 2 * p, min(4, side))))
                       for p, side in zip(padding, sides, strict=True))  # fmt: skip
        stride, ceil, dilation = self.pair(1, 3), self.draw(st.booleans()), (1, 1)
        if self.draw(st.booleans()):
            step: Step = MaxPool(x, self.outs(on=self.grids[x]), None, kernel, stride, padding, dilation, ceil)
        else:
            step = AveragePool(
                x, self.outs(), self.activation(), kernel, stride, padding, ceil_mode=ceil,
                count_include_pad=self.draw(st.booleans()), divisor=self.draw(st.sampled_from([0, 0, 5])),
            )  # fmt: skip
        self.add(step, (channels, *out_sides(sides, kernel, stride, padding, dilation, ceil)))

    def adaptive(self) -> None:
        """Also to more than there is."""
        x = self.map()
        size = self.draw(st.sampled_from([(1, 1), self.pair(1, 8)]))
        if self.draw(st.booleans()):
            step: Step = AveragePool(x, self.outs(), self.activation(), output=size)
        else:
            step = MaxPool(x, self.outs(on=self.grids[x]), None, None, output=size)
        self.add(step, (self.shapes[x][0], *size))

    def bilinear(self) -> None:
        x = self.map()
        channels, *sides = self.shapes[x]
        size = self.pair(1, 9) if self.draw(st.booleans()) else tuple(2 * side for side in sides)
        size = size if math.prod(size) <= MOST_PIXELS else (3, 3)
        align = self.draw(st.booleans())
        rows, columns = (places(side, out, align) for side, out in zip(sides, size, strict=True))
        self.add(Resize(x, self.outs(), self.activation(), *rows, *columns), (channels, *size))

    def pair(self, least: int, most: int) -> tuple[int, int]:
        return self.draw(st.integers(least, most)), self.draw(st.integers(least, most))

    # --- moves --------------------------------------------------------------------------------------------------

    def move(self, x: str, shape: Shape, others: tuple[str, ...] = (), **places: Any) -> None:
        fill = self.draw(st.integers(self.grids[x].quant_min, self.grids[x].quant_max))
        self.add(Move(x, self.outs(on=self.grids[x]), None, shape, others, fill=fill, **places), shape)

    def concatenation(self) -> None:
        """Of values of one size, the first one's grid theirs; also of one value twice."""
        x = self.value()
        channels, *sides = self.shapes[x]
        fits = [name for name in self.shapes if list(self.shapes[name][1:]) == sides]
        others = tuple(
            self.rescaled(self.draw(st.sampled_from(fits)), self.grids[x]) for _ in range(self.draw(st.integers(1, 3)))
        )
        total = channels + sum(self.shapes[name][0] for name in others)
        if total > MOST_CHANNELS:
            others, total = (x,), 2 * channels
        chosen = None
        if self.draw(st.booleans()):  # some of all, in any order
            chosen = torch.randperm(total, generator=self.random)[: self.draw(st.integers(1, total))].int()
        self.move(x, (total if chosen is None else len(chosen), *sides), others, channels=chosen)

    def slice(self) -> None:
        x = self.value()
        channels, *sides = self.shapes[x]
        first = self.draw(st.integers(0, channels - 1))
        last, step = self.draw(st.integers(first + 1, channels)), self.draw(st.integers(1, 2))
        chosen = torch.arange(first, last, step, dtype=torch.int32)
        self.move(x, (len(chosen), *sides), channels=chosen)

    def shuffle(self) -> None:
        """Channels in another order, and some that hold nothing."""
        x = self.value()
        channels, *sides = self.shapes[x]
        chosen = torch.randperm(channels, generator=self.random).int()
        if self.draw(st.booleans()):
            chosen[:: self.draw(st.integers(2, 5))] = -1
        self.move(x, (channels, *sides), channels=chosen)

    def pad(self) -> None:
        x = self.map()
        channels, height, width = self.shapes[x]
        (top, bottom), (left, right) = self.pair(0, 2), self.pair(0, 2)
        index = torch.arange(height * width, dtype=torch.int32).view(1, 1, height, width)
        pixels = F.pad(index, (left, right, top, bottom), value=-1)[0, 0]
        self.move(x, (channels, *pixels.shape), pixels=pixels.flatten())

    def nearest(self) -> None:
        x = self.map()
        channels, height, width = self.shapes[x]
        down, across = self.pair(1, 2)
        rows, columns = torch.arange(height * down) // down, torch.arange(width * across) // across
        pixels = (rows[:, None] * width + columns).int()
        if pixels.numel() <= MOST_PIXELS:
            self.move(x, (channels, *pixels.shape), pixels=pixels.flatten())

    def anywhere(self) -> None:
        """Any element of one value, or of two, to any place."""
        x = self.value()
        size = math.prod(self.shapes[x])
        others = (self.rescaled(self.value(), self.grids[x]),) if self.draw(st.booleans()) else ()
        size += sum(math.prod(self.shapes[name]) for name in others)
        shape = self.draw(st.sampled_from([1, 3, 8])), *self.pair(1, 6)
        index = torch.randint(-1, size, (math.prod(shape),), generator=self.random).int()
        self.move(x, shape, others, index=index)

    # --- ends ---------------------------------------------------------------------------------------------------

    def ended(self) -> IntegerGraph:
        """A linear layer of what came last, and results of other values; some in another order."""
        size = math.prod(self.shapes[self.current])
        head, bits = self.weight((5, size))
        mult, bias = torch.rand(5, generator=self.random), self.numbers(5)
        activation = self.activation()
        self.steps.append(Layer(self.current, ("logits",), activation, "head", head, bits, mult, bias, None))
        outputs = [Output("logits", (5,), None, self.draw(st.sampled_from([None, "softmax", "log_softmax"])))]
        for index in range(self.draw(st.integers(0, 2))):
            outputs.append(self.output(f"real{index}"))
        structure: Any = 0 if len(outputs) == 1 else self.draw(st.sampled_from([
            list(range(len(outputs))), {"logits": 0, "others": list(range(1, len(outputs)))},
        ]))  # fmt: skip
        return IntegerGraph(self.input_shape, self.grids, tuple(self.steps), tuple(outputs), {}, None, structure)

    def output(self, name: str) -> Output:
        """A real value of any step that may have one."""
        x = self.value()
        shape = self.shapes[x]
        kind = self.draw(st.sampled_from(["rescale", "table", "add", "multiply", "pool", "resize"]))
        if x in self.vectors and kind in ("pool", "resize"):
            kind = "rescale"
        common, whole = (x, (name,), self.activation()), self.grids[x].scale
        if kind == "table":
            step: Step = Table(*common, *self.function(self.grids[x]))
        elif kind == "add":
            step = Add(*common, x)
        elif kind == "multiply":
            step = Multiply(*common, x, fp32(whole * whole))
        elif kind == "pool":
            step, shape = AveragePool(*common, output=(2, 3)), (shape[0], 2, 3)
        elif kind == "resize":
            step = Resize(*common, *places(shape[1], 3, False), *places(shape[2], 2, True))
            shape = (shape[0], 3, 2)
        else:
            slope = self.numbers(shape[0]) if self.draw(st.booleans()) else None
            step = Rescale(*common, slope=slope)
        self.steps.append(step)
        own = shape[:1] if x in self.vectors else shape
        if self.draw(st.booleans()):
            return Output(name, own)
        size = self.draw(st.integers(1, math.prod(shape)))
        order = torch.randperm(math.prod(shape), generator=self.random)[:size]
        return Output(name, (size,), order, self.draw(st.sampled_from([None, "softmax"])))


_KINDS: dict[str, Callable[[_Network], None]] = {
    "convolution": _Network.convolution, "linear": _Network.linear, "rescale": _Network.rescale,
    "table": _Network.table, "add": _Network.add_values, "multiply": _Network.multiply, "pool": _Network.pool,
    "adaptive": _Network.adaptive, "bilinear": _Network.bilinear, "concatenation": _Network.concatenation,
    "slice": _Network.slice, "shuffle": _Network.shuffle, "pad": _Network.pad, "nearest": _Network.nearest,
    "anywhere": _Network.anywhere, "convolution_again": _Network.convolution,
}  # fmt: skip
