"""The integer engine against the operators' references and against arithmetic: zero tolerance."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dfq import engine
from dfq.engine.check import check_graph
from dfq.engine.graph import (
    IMAGES,
    Add,
    AveragePool,
    Grid,
    IntegerGraph,
    Layer,
    Output,
    Quantize,
    Table,
)  # fmt: skip
from dfq.engine.native import NativeNetwork
from dfq.engine.run import BACKENDS, missing
from dfq_kernels import BackendError, extension
from tests.engine_graphs import GRAPHS, reference_values, residual_network, same
from tests.random_networks import fp32, networks

needs_native = pytest.mark.skipif(extension.missing("cpu") is not None, reason="no native kernels")
NORMALIZATION = (0.3, 0.5, 0.7), (0.2, 0.25, 0.3)


@needs_native
@settings(max_examples=300, deadline=None)
@given(graph=networks(), count=st.integers(1, 3), seed=st.integers(0, 2**31))
def test_networks_of_any_shape(graph: IntegerGraph, count: int, seed: int) -> None:
    check_graph(graph)
    images = 3 * torch.randn(count, *graph.input_shape, generator=torch.Generator().manual_seed(seed))
    expected = reference_values(graph, images)
    assert not same(NativeNetwork(graph)(images), expected)
    kept = NativeNetwork(graph, keep=True).values(images[:1])
    assert kept.keys() == expected.keys() and not same(kept, {name: value[:1] for name, value in expected.items()})


@needs_native
@pytest.mark.parametrize("name", GRAPHS)
def test_networks_made_by_hand(name: str) -> None:
    graph = GRAPHS[name]()
    images = 3 * torch.randn(3, *graph.input_shape, generator=torch.Generator().manual_seed(1))
    expected = reference_values(graph, images)
    kept = NativeNetwork(graph, keep=True).values(images[:1])
    assert kept.keys() == expected.keys() and not same(kept, {name: value[:1] for name, value in expected.items()})
    network, threads = NativeNetwork(graph), torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            assert not same(network(images), expected)
            assert not same(network(images[:1]), {name: value[:1] for name, value in expected.items()})
    finally:
        torch.set_num_threads(threads)


LEVEL = """
import torch
from dfq.engine.native import NativeNetwork
from dfq_kernels import extension
from tests.engine_graphs import GRAPHS, reference_values, same
for name, make in GRAPHS.items():
    graph = make()
    images = torch.randn(2, *graph.input_shape)
    assert not same(NativeNetwork(graph)(images), reference_values(graph, images)), name
print(extension.native().isa)
"""


@needs_native
@pytest.mark.parametrize("level", ["baseline", "v3", "v4", "v4_vbmi", "v4_vnni"])
def test_every_instruction_set_level(level: str) -> None:
    """`v2` multiplies as the baseline does; `v4` is without VBMI and VNNI, `v4_vnni` without AMX."""
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
    outputs = (Output("logits", (2,)),)
    graph = IntegerGraph((2, 256, 256), {"x": Grid(1.0, 0, 0, 255), "y": grid}, steps, outputs)
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


# --- the engine -----------------------------------------------------------------------------------------------------


@needs_native
def test_batches_and_threads_change_no_bit() -> None:
    graph = residual_network()
    network = engine.Engine(graph)
    images = torch.randn(7, *graph.input_shape)
    whole = network(images)
    assert whole.shape == (7, 10)
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


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_several_outputs_come_as_the_network_gave_them(backend: str) -> None:
    if (reason := missing(backend, torch.device("cpu"))) is not None:
        pytest.skip(reason)
    graph = GRAPHS["pyramid"]()
    images = torch.randn(2, *graph.input_shape)
    values, found = reference_values(graph, images), engine.Engine(graph, backend=backend)(images)
    mask = values[graph.outputs[0].value]
    assert list(found) == ["masks", "score"] and graph.num_classes is None
    assert torch.equal(found["masks"][0], mask.softmax(1)) and found["masks"][0].shape == (2, 3, 8, 10)
    assert torch.equal(found["masks"][1], mask.permute(0, 2, 3, 1).reshape(2, 8, 30).log_softmax(2))
    assert torch.equal(found["score"], values[graph.outputs[1].value])


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("channels", [1, 3, 6])
def test_bytes_are_what_normalize_makes_of_them(backend: str, channels: int) -> None:
    if (reason := missing(backend, torch.device("cpu"))) is not None:
        pytest.skip(reason)
    normalization = tuple((part * 2)[:channels] for part in NORMALIZATION)
    for made in (residual_network((channels, 7, 9)), read_twice((channels, 7, 9)), read_twice((channels, 5))):
        graph = IntegerGraph(made.input_shape, made.grids, made.steps, made.outputs, normalization=normalization)
        network = engine.Engine(graph, backend=backend)
        pixels = torch.randint(0, 256, (3, *graph.input_shape), generator=torch.Generator().manual_seed(2)).byte()
        assert torch.equal(network(pixels), network(network.normalize(pixels)))
        turned = pixels.transpose(1, -1).contiguous().transpose(1, -1)
        assert torch.equal(network(turned), network(pixels))


def read_twice(shape: tuple[int, ...]) -> IntegerGraph:
    """Images on several grids, one of them with an activation, another with a table behind it in registers."""
    grids = {"a": Grid(0.02, 3, 0, 255), "b": Grid(0.1, -2, -8, 7), "c": Grid(0.05, 0, -128, 127)}
    grids["d"] = grids["c"]
    values = torch.tanh(torch.arange(16.0) - 6)
    size = torch.Size(shape).numel()
    weight = torch.randint(-8, 8, (6, size), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    steps = (
        Quantize(IMAGES, ("a",), "hardswish"),
        Quantize(IMAGES, ("b",), None),
        Table("b", ("c",), None, values),
        Add("a", ("d",), None, "c"),
        Layer("d", ("logits",), None, "l", weight, 4, torch.ones(6) / 64, torch.zeros(6), None),
    )
    return IntegerGraph(shape, grids, steps, (Output("logits", (6,)),))


@pytest.mark.parametrize("backend", BACKENDS)
def test_wrong_images_are_refused(backend: str, wide_tiles: None) -> None:
    if (reason := missing(backend, torch.device("cpu"))) is not None:
        pytest.skip(reason)
    network = engine.Engine(residual_network(), backend=backend)
    images = torch.zeros(2, 3, 9, 11)
    for wrong, text in (
        (torch.zeros(2, 1, 9, 11), r"images must be \[N, 3, 9, 11\], got \(2, 1, 9, 11\)"),
        (torch.zeros(3, 9, 11), r"images must be \[N, 3, 9, 11\]"),
        (images.to(torch.uint8), "images must be floating point"),
        (images.masked_fill(torch.rand(2, 3, 9, 11) > 0.99, float("nan")), "images must be numbers, got NaN"),
    ):
        with pytest.raises(ValueError, match=text):
            network(wrong)
    assert bool(network(torch.full((1, 3, 9, 11), float("inf"))).isfinite().all())
    with pytest.raises(ValueError, match="normalised: the network was exported without --mean and --std"):
        network.normalize(images.to(torch.uint8))


def test_a_backend_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = residual_network()
    with pytest.raises(ValueError, match="engine: backend must be one of native, triton, reference, got 'cuda'"):
        engine.Engine(graph, backend="cuda")
    with pytest.raises(ValueError, match="engine: capture must be auto or off where reference runs, got 'on'"):
        engine.Engine(graph, backend="reference", capture="on")
    monkeypatch.setattr(extension, "missing", lambda _: "it was not built")
    with pytest.raises(BackendError, match="engine: backend must be one that is there, got 'native': it was not built"):
        engine.Engine(graph, backend="native")
    assert engine.Engine(graph).backend == "reference"
