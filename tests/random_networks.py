"""Integer networks of any shape, drawn by hypothesis."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from hypothesis import strategies as st

from dfq.engine.graph import (
    ACTIVATIONS,
    IMAGES,
    Add,
    AveragePool,
    Grid,
    IntegerGraph,
    Layer,
    MaxPool,
    Quantize,
    Rescale,
    Step,
)  # fmt: skip


@st.composite
def networks(draw) -> IntegerGraph:
    """An image, a layer or two, pools and additions of odd shapes, zero points at both ends."""
    seed = draw(st.integers(0, 2**31))
    random = torch.Generator().manual_seed(seed)
    channels = draw(st.sampled_from([1, 2, 3, 4, 7, 8, 16, 17, 24, 36]))
    image_shape = (channels, draw(st.integers(1, 11)), draw(st.integers(1, 19)))
    shape: tuple[int, ...] = image_shape
    grids: dict[str, Grid] = {}
    steps: list[Step] = []

    def grid(name: str) -> str:
        bits = draw(st.sampled_from([2, 4, 5, 8]))
        low = draw(st.sampled_from([0, -(2 ** (bits - 1))]))
        high = low + 2**bits - 1
        grids[name] = Grid(fp32(draw(st.floats(0.01, 2.0))), draw(st.sampled_from([low, high, low + 1])), low, high)
        return name

    def outs(count: int = 1) -> tuple[str, ...]:
        return tuple(grid(f"v{len(grids)}") for _ in range(count))

    steps.append(Quantize(IMAGES, outs(draw(st.integers(1, 2))), draw(st.sampled_from(ACTIVATIONS))))
    current = steps[-1].outs[0]
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(["conv", "depthwise", "groups", "rescale", "pool", "max", "adaptive", "add"]))
        if kind in ("conv", "depthwise", "groups"):
            step, shape = _convolution(draw, random, kind, current, shape)
            steps.append(replace(step, outs=outs(draw(st.integers(1, 2)))))
        elif kind == "rescale":
            constants = (
                [torch.randn(shape[0], generator=random) for _ in range(3)] if draw(st.booleans()) else [None] * 3
            )
            steps.append(Rescale(current, outs(2), draw(st.sampled_from(ACTIVATIONS)), *constants))
        elif kind == "add":
            steps.append(Add(current, outs(), draw(st.sampled_from(ACTIVATIONS)), current))
        elif kind == "adaptive":
            size = draw(st.integers(1, shape[1])), draw(st.integers(1, shape[2]))
            steps.append(AveragePool(current, outs(), None, output=size))
            shape = (shape[0], *size)
        else:
            kernel = draw(st.integers(1, min(3, shape[1]))), draw(st.integers(1, min(3, shape[2])))
            stride, padding = draw(st.integers(1, 2)), (kernel[0] // 2, kernel[1] // 2)
            if kind == "pool":
                steps.append(AveragePool(current, outs(), None, kernel, (stride, stride), padding))
            else:
                name = f"v{len(grids)}"
                grids[name] = grids[current]
                steps.append(MaxPool(current, (name,), None, kernel, (stride, stride), padding))
            shape = (shape[0], *(_count(s, k, stride, p) for s, k, p in zip(shape[1:], kernel, padding, strict=True)))
        current = steps[-1].outs[0]
    if draw(st.booleans()):
        met, shape = _vectors_and_pixels(random, current, shape[0], outs)
        steps, current = steps + met, met[-1].outs[0]
    size = math.prod(shape)
    head = torch.randint(-8, 8, (5, size), generator=random).to(torch.int8)
    mult, bias = torch.rand(5, generator=random), torch.randn(5, generator=random)
    steps.append(Layer(current, ("logits",), None, "head", head, 4, mult, bias, None))
    return IntegerGraph(image_shape, 5, grids, tuple(steps), "logits", {})


def _vectors_and_pixels(random, x: str, channels: int, outs) -> tuple[list[Step], tuple[int, ...]]:
    """Every step that may read a vector beside a map of one pixel, in both orders; the last one makes a vector."""

    def layer(x: str, residual: str, axes: int) -> Layer:
        weight = torch.randint(-8, 8, (channels, channels, 1, 1)[:axes], generator=random).to(torch.int8)
        mult, bias = torch.randn(channels, generator=random) / 8, torch.randn(channels, generator=random)
        return Layer(x, outs(), "relu", f"meets{x}", weight, 4, mult, bias, residual)

    pixel = AveragePool(x, outs(), None, output=(1, 1))
    (mapped,) = pixel.outs
    linear = layer(mapped, mapped, 2)
    (vector,) = linear.outs
    steps = [pixel, linear, layer(mapped, vector, 4), Add(mapped, outs(), None, vector)]
    norm = [torch.randn(channels, generator=random) for _ in range(3)]
    steps += [Rescale(vector, outs(), None, *norm), layer(vector, steps[-1].outs[0], 2)]
    steps.append(Add(steps[-2].outs[0], outs(), None, steps[2].outs[0]))
    steps.append(Add(steps[-1].outs[0], outs(), "relu6", steps[-2].outs[0]))
    return steps, (channels,)


def fp32(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float32))


def _count(side: int, kernel: int, stride: int, padding: int, dilation: int = 1) -> int:
    return (side + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def _convolution(draw, random, kind: str, x: str, shape: tuple[int, int, int]) -> tuple[Layer, tuple[int, int, int]]:
    channels = shape[0]
    divisors = [count for count in range(1, channels + 1) if channels % count == 0]
    groups = {"conv": 1, "depthwise": channels, "groups": draw(st.sampled_from(divisors))}[kind]
    out = channels if kind == "depthwise" else groups * draw(st.sampled_from([1, 2, 5, 16, 33]))
    padding = draw(st.integers(0, 2)), draw(st.integers(0, 2))
    dilation = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    fits = [
        max(1, min(5, (side + 2 * p - 1) // d + 1)) for side, p, d in zip(shape[1:], padding, dilation, strict=True)
    ]
    kernel = draw(st.integers(1, fits[0])), draw(st.integers(1, fits[1]))
    stride = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    bits = draw(st.sampled_from([2, 4, 8]))
    size = (out, channels // groups, *kernel)
    weight = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), size, generator=random).to(torch.int8)
    scale = 2.0 ** draw(st.integers(-14, -2))
    mult, bias = torch.rand(out, generator=random) * scale, torch.randn(out, generator=random)
    activation = draw(st.sampled_from(ACTIVATIONS))
    layer = Layer(
        x, (), activation, f"conv{x}", weight, bits, mult, bias, None, stride, padding, dilation, groups
    )  # fmt: skip
    sides = zip(shape[1:], kernel, stride, padding, dilation, strict=True)
    height, width = (_count(side, k, s, p, d) for side, k, s, p, d in sides)
    if (height, width) == shape[1:] and out == channels and draw(st.booleans()):
        layer = replace(layer, residual=x)
    return layer, (out, height, width)
