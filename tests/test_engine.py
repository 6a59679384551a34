"""The integer engine against the trained graph and against arithmetic: zero tolerance."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dfq import engine
from dfq.config import quant_config
from dfq.data.images import load_images
from dfq.engine.check import GraphError, check_graph
from dfq.engine.graph import (
    IMAGES,
    AveragePool,
    Grid,
    IntegerGraph,
    Layer,
    Quantize,
    inputs,
)  # fmt: skip
from dfq.engine.memory import fuse, plan_memory
from dfq.engine.native import NativeNetwork
from dfq.engine.run import BACKENDS, missing
from dfq.export import ExportError, export
from dfq.quant import freeze_ranges, prepare, set_adapting
from dfq_kernels import BackendError, extension
from tests.conftest import small_net
from tests.integer_networks import (
    NETWORKS,
    PRESETS,
    exact_values,
    exported,
    input_shape,
    quantized,
    reference_values,
    same,
)
from tests.random_networks import fp32, networks

needs_native = pytest.mark.skipif(extension.missing("cpu") is not None, reason="no native kernels")


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", NETWORKS)
def test_every_integer_is_the_trained_graph_s(name: str, preset: str) -> None:
    model, graph = exported(name, preset)
    images = torch.randn(2, *input_shape(name), generator=torch.Generator().manual_seed(3))
    expected = exact_values(model, graph, images)
    found = reference_values(graph, images)
    assert found.keys() == expected.keys() and not same(found, expected)
    if extension.missing("cpu") is None:
        assert torch.equal(NativeNetwork(graph)(images), expected[graph.output])
        one = NativeNetwork(graph, keep=True).values(images[:1])
        assert one.keys() == expected.keys()
        assert not same(one, {name: value[:1] for name, value in expected.items()})


@needs_native
def test_the_whole_test_set_has_the_trained_graph_s_logits() -> None:
    model, graph = exported("wrn-16-1", "W4A4")
    test = load_images("fashion-mnist", "test")
    network = engine.Engine(graph)
    for start in range(0, len(test), 1000):
        images = test.normalize(test.pixels[start : start + 1000])
        with torch.no_grad():
            assert torch.equal(network(images), model(images))


# --- layers of any shape ------------------------------------------------------------------------------------------


@needs_native
@settings(max_examples=150, deadline=None)
@given(graph=networks(), count=st.integers(1, 3), seed=st.integers(0, 2**31))
def test_layers_of_any_shape(graph: IntegerGraph, count: int, seed: int) -> None:
    check_graph(graph)
    images = 3 * torch.randn(count, *graph.input_shape, generator=torch.Generator().manual_seed(seed))
    expected = reference_values(graph, images)
    assert torch.equal(NativeNetwork(graph)(images), expected["logits"])
    kept = NativeNetwork(graph, keep=True).values(images[:1])
    assert not same(kept, {name: value[:1] for name, value in expected.items()})


LEVEL = """
import sys, torch
from dfq.engine.native import NativeNetwork
from dfq_kernels import extension
from tests.integer_networks import exported, input_shape, reference_values
for name in ("wrn-16-1", "mobilenet-v2"):
    _, graph = exported(name, "W4A8")
    images = torch.randn(2 if name == "wrn-16-1" else 1, *input_shape(name))
    assert torch.equal(NativeNetwork(graph)(images), reference_values(graph, images)["logits"]), name
print(extension.native().isa)
"""


@needs_native
@pytest.mark.parametrize("level", ["baseline", "v3", "v4"])
def test_every_instruction_set_level(level: str) -> None:
    """`v2` multiplies as the baseline does; `v4` is without VNNI."""
    environment = {**os.environ, "DFQ_CPU": level, "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", LEVEL], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() <= level


# --- rounding against fractions -----------------------------------------------------------------------------------


def rounded(acc: int, mult: float, bias: float, grid: Grid) -> int:
    """The specification, each operation a rational number rounded to fp32."""
    inverse = np.float32(Fraction(1) / Fraction(grid.scale))
    t = _nearest(Fraction(float(np.float32(acc))) * Fraction(mult))
    t = _nearest(t + Fraction(bias))
    v = _nearest(t * Fraction(float(inverse)))
    v = _nearest(v + grid.zero_point)
    return min(max(round(v), grid.quant_min), grid.quant_max)  # Python rounds half to even


def _nearest(value: Fraction) -> Fraction:
    """The fp32 number nearest to a fraction: fp64's nearest is not always on the way, so it is found exactly."""
    guess = np.float32(float(value))
    around = [np.nextafter(guess, np.float32(-np.inf)), guess, np.nextafter(guess, np.float32(np.inf))]
    distances = [abs(Fraction(float(item)) - value) for item in around]
    least = min(distances)
    nearest = [item for item, distance in zip(around, distances, strict=True) if distance == least]
    even = [item for item in nearest if not int(np.array(item, np.float32).view(np.uint32)) & 1]
    return Fraction(float((even or nearest)[0]))


CONSTANTS = {
    "halves": (0.5, 0.0, Grid(1.0, 3, 0, 255)),
    "halves below zero": (-0.5, 0.0, Grid(1.0, -1, -128, 127)),
    "halves through a bias": (1.0, 0.5, Grid(1.0, 0, -8, 7)),
    "quarters": (0.25, 0.125, Grid(0.5, 128, 0, 255)),
    "a third": (fp32(1 / 3), fp32(-1 / 6), Grid(fp32(1 / 3), 5, 0, 15)),
    "near ties": (float(np.nextafter(np.float32(0.5), np.float32(1))), 0.0, Grid(1.0, 0, -128, 127)),
    "tiny": (fp32(2.0**-120), 0.0, Grid(2.0**-122, 0, 0, 255)),
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_rounding_of_every_accumulator_in_a_window(name: str) -> None:
    """a * 127 + b with a, b in 0..255: every accumulator from 0 to 32,640, and their negatives."""
    mult, bias, grid = CONSTANTS[name]
    weight = torch.tensor([[127, 1], [-127, -1]], dtype=torch.int8)[:, :, None, None]
    steps = (
        Quantize(IMAGES, ("x",), None),
        Layer("x", ("y",), None, "l", weight, 8, torch.full((2,), mult), torch.full((2,), bias), None),
        AveragePool("y", ("logits",), None),
    )
    graph = IntegerGraph((2, 256, 256), 2, {"x": Grid(1.0, 0, 0, 255), "y": grid}, steps, "logits", {})
    values = torch.arange(256.0)
    images = torch.stack([values[:, None].expand(256, 256), values.expand(256, 256)])[None]
    found = [reference_values(graph, images)["y"]]
    if extension.missing("cpu") is None:
        found.append(NativeNetwork(graph, keep=True).values(images)["y"])
        assert torch.equal(*found)
    acc = (127 * values[:, None] + values).long()
    window = {int(value): rounded(int(value), mult, bias, grid) for value in range(-400, 401)}
    window |= {value: rounded(value, mult, bias, grid) for value in (32640, 32639, -32640, 16384, 9999)}
    for sign, plane in zip((1, -1), found[0][0], strict=True):
        for value, expected in window.items():
            where = sign * acc == value
            if bool(where.any()):
                assert plane[where].unique().tolist() == [expected], value


# --- engine and memory --------------------------------------------------------------------------------------------


@needs_native
def test_batches_and_threads_change_no_bit() -> None:
    _, graph = exported("resnet20", "W4A4")
    network = engine.Engine(graph)
    images = torch.randn(7, 3, 32, 32)
    whole = network(images)
    assert torch.equal(torch.cat([network(image[None]) for image in images]), whole)
    assert network(images[:0]).shape == (0, 10)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            assert torch.equal(network(images), whole)
    finally:
        torch.set_num_threads(threads)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(network, [images] * 12):
            assert torch.equal(found, whole)
    assert torch.equal(network(images.to(torch.float64)), whole)
    assert torch.equal(network(images.contiguous(memory_format=torch.channels_last)), whole)
    assert torch.equal(engine.Engine(graph, backend="reference")(images), whole)


@settings(max_examples=60, deadline=None)
@given(graph=networks())
def test_values_that_live_together_share_no_byte(graph: IntegerGraph) -> None:
    groups, shapes = fuse(graph), check_graph(graph)
    places, total = plan_memory(graph, groups, shapes)
    _, without = plan_memory(graph, groups, shapes, reuse=False)
    assert total <= without
    last = {name: index for index, group in enumerate(groups) for name in group.inputs}
    made = {out: index for index, group in enumerate(groups) for out in group.outs}
    assert sorted(step.x for group in groups for step in (group.step, *group.chained)) == sorted(
        step.x for step in graph.steps
    )
    for one, place in places.items():
        assert place.offset % 64 == 0 and place.offset + place.size <= total
        for other, its in places.items():
            together = made[one] <= last.get(other, made[other]) and made[other] <= last.get(one, made[one])
            if one != other and together:
                assert place.offset + place.size <= its.offset or its.offset + its.size <= place.offset


@pytest.mark.parametrize("backend", BACKENDS)
def test_wrong_images_are_refused(backend: str, wide_tiles: None) -> None:
    if (reason := missing(backend, torch.device("cpu"))) is not None:
        pytest.skip(reason)
    _, graph = exported("wrn-16-1", "W8A8")
    network = engine.Engine(graph, backend=backend)
    images = torch.zeros(2, 1, 32, 32)
    for wrong, text in (
        (torch.zeros(2, 3, 32, 32), r"images must be \[N, 1, 32, 32\], got \(2, 3, 32, 32\)"),
        (torch.zeros(1, 32, 32), r"images must be \[N, 1, 32, 32\]"),
        (images.to(torch.uint8), "images must be floating point"),
        (images.masked_fill(torch.rand(2, 1, 32, 32) > 0.99, float("nan")), "images must be numbers, got NaN"),
    ):
        with pytest.raises(ValueError, match=text):
            network(wrong)
    assert bool(network(torch.full((1, 1, 32, 32), float("inf"))).isfinite().all())
    with pytest.raises(ValueError, match="normalised: the network was exported without --mean and --std"):
        network.normalize(images.to(torch.uint8))


def test_a_backend_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    _, graph = exported("wrn-16-1", "W8A8")
    with pytest.raises(ValueError, match="engine: backend must be one of native, triton, reference, got 'cuda'"):
        engine.Engine(graph, backend="cuda")
    with pytest.raises(ValueError, match="engine: capture must be auto or off where reference runs, got 'on'"):
        engine.Engine(graph, backend="reference", capture="on")
    monkeypatch.setattr(extension, "missing", lambda _: "it was not built")
    with pytest.raises(BackendError, match="engine: backend must be one that is there, got 'native': it was not built"):
        engine.Engine(graph, backend="native")
    assert engine.Engine(graph).backend == "reference"


# --- export -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "text"),
    [("gdfq-W4A4", "export: the input of .* must be quantized, got a float one"), ("W4A4", None)],
)
def test_what_is_no_integer_network_is_not_exported(preset: str, text: str | None) -> None:
    model = quantized(small_net(), (1, 12, 12), preset)
    if text is None:
        assert {type(step).kind for step in export(model, (1, 12, 12), 4).steps} >= {
            "quantize",
            "layer",
            "average_pool",
        }
        return
    with pytest.raises(ExportError, match=text):
        export(model, (1, 12, 12), 4)


def test_affine_weights_are_not_exported() -> None:
    config = replace(quant_config("W4A4"), weight_scheme="affine")
    model = prepare(small_net(), (1, 12, 12), config)
    set_adapting(model, True)
    model(torch.randn(2, 1, 12, 12))
    freeze_ranges(model)
    with pytest.raises(ExportError, match="weights of conv1 must be symmetric"):
        export(model.eval(), (1, 12, 12), 4)


def test_a_residual_is_added_where_it_is_there() -> None:
    """The shortcut's integers are made before the step that adds them, whatever the order of the trained graph."""
    _, graph = exported("resnet18", "W4A4")
    seen = {IMAGES}
    for step in graph.steps:
        assert set(inputs(step)) <= seen
        seen |= set(step.outs)
    assert sum(isinstance(step, Layer) and step.residual is not None for step in graph.steps) == 8


def test_a_graph_that_is_no_network_is_refused() -> None:
    _, graph = exported("wrn-16-1", "W8A8")
    layer = next(step for step in graph.steps if isinstance(step, Layer))

    def changed(**fields: object) -> IntegerGraph:
        steps = tuple(replace(layer, **fields) if step is layer else step for step in graph.steps)
        return replace(graph, steps=steps)

    for wrong, text in (
        (changed(x="nothing"), "an input must be a quantized value of an earlier step, got 'nothing'"),
        (changed(stride=(0, 1)), r"stride must be 2 integers in \[1, 65536\], got \(0, 1\)"),
        (changed(padding=(10**9, 0)), "padding must be 2 integers"),
        (changed(groups=3), "groups must be a divisor"),
        (changed(mult=layer.mult[:-1]), "mult must be float32"),
        (changed(bias=layer.bias.clone().fill_(float("nan"))), "bias must be at most 2\\^64"),
        (changed(weight_bits=2), "weight must be of 2 bits"),
        (changed(activation="gelu"), "activation must be None, relu or relu6"),
        (changed(residual=layer.x), "residual must be of shape"),
        (replace(graph, num_classes=11), r"logits must be \[11\]"),
        (replace(graph, output=graph.steps[0].outs[0]), "must be on a grid, or the output|output must be"),
        (replace(graph, grids=graph.grids | {layer.x: Grid(0.0, 0, 0, 255)}), "the scale of .* must be in"),
        (replace(graph, grids=graph.grids | {layer.x: Grid(1.0, 300, 0, 255)}), "zero point"),
        (replace(graph, steps=()), "steps must be at least one"),
    ):
        with pytest.raises(GraphError, match=text):
            check_graph(wrong)


def test_sums_beyond_int32_are_refused() -> None:
    """70,000 inputs of 255 with weights of 127."""
    weight = torch.full((1, 70000), 127, dtype=torch.int8)
    steps = (
        Quantize(IMAGES, ("x",), None),
        Layer("x", ("logits",), None, "l", weight, 8, torch.ones(1), torch.ones(1), None),
    )
    graph = IntegerGraph((7, 100, 100), 1, {"x": Grid(1.0, 0, 0, 255)}, steps, "logits", {})
    with pytest.raises(GraphError, match="the largest sum must be below 2\\^31, got 2266950000"):
        check_graph(graph)
