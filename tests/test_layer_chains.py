"""Layers one after the other, in any order, on every instruction-set level and interpreted: zero tolerance."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import dfq
from dfq.engine import Engine
from dfq.engine.run import missing
from dfq.student import integer_graph
from dfq_kernels import extension
from tests.integer_networks import exact_values, reference_values, same
from tests.layer_networks import MIXED, chained, network
from tests.wired_networks import Wiring, wired, wirings


@settings(max_examples=12, deadline=None)
@given(
    names=st.lists(st.sampled_from(MIXED), min_size=1, max_size=3),
    sides=st.tuples(st.integers(5, 14), st.integers(5, 14)),
    preset=st.sampled_from(["W8A8", "W4A8", "W4A4", "W2A2"]),
)
def test_parts_in_any_order_are_the_same_integers(names: list[str], sides: tuple[int, int], preset: str) -> None:
    """Every integer of the trained graph that the integer graph has by the same name, and the outputs."""
    try:
        model, shape = chained(names, sides)
    except RuntimeError:  # a window that does not fit a map that has become small
        assume(False)
    images = torch.randn(4, *shape, generator=torch.Generator().manual_seed(7))
    student = dfq.prepare(model, shape, preset=preset)
    dfq.calibrate(student, [images])
    made = integer_graph(student.eval())
    found, expected = reference_values(made, images), exact_values(student, made, images)
    assert not same({name: found[name] for name in expected}, expected)
    if extension.missing("cpu") is None:
        assert torch.equal(Engine(made)(images), student(images))


# a padded value as an output and, with fewer bits, in a layer: both round what fills it
PADDED_TWICE = Wiring((("conv", 0, 0), ("pad and crop", 0, 0), ("halves", 0, 1), ("conv", 1, 1)), (1,), (4, 4))
PADDED_AND_ADDED = Wiring((("pad and crop", 0, 0), ("add", 0, 0)), (), (3, 3))  # what fills the sum is twice the fill
PADDED_AGAIN = Wiring((("conv", 0, 0), ("pad and crop", 0, 0), ("pad and crop", 0, 0)), (), (7, 3))


def check_wiring(wiring: Wiring, preset: str, backend: str) -> None:
    """The outputs, and by the reference every integer that the trained graph has by the same name."""
    student, images = calibrated(wired(wiring), (3, *wiring.sides), preset)
    images = images[:1] if backend == "triton" else images
    made = integer_graph(student)
    outputs = zip(Engine(made, backend=backend)(images), student(images), strict=True)
    assert all(torch.equal(found, expected) for found, expected in outputs), backend
    if backend == "reference":
        found, expected = reference_values(made, images), exact_values(student, made, images)
        assert not same({name: found[name] for name in expected if name in made.grids}, expected)


PRESETS = st.sampled_from(["W8A8", "W4A8", "W4A4"])


@settings(max_examples=int(os.environ.get("DFQ_WIRINGS", "15")), deadline=None)
@given(wiring=wirings(), preset=PRESETS)
@example(PADDED_TWICE, "W4A4")
@example(PADDED_AGAIN, "W8A8")
@example(PADDED_AND_ADDED, "W8A8")
def test_any_wiring_is_the_same_integers(wiring: Wiring, preset: str) -> None:
    """Values that several calls read with different bits, as they are, or as outputs."""
    for backend in ["reference"] if extension.missing("cpu") else ["reference", "native"]:
        check_wiring(wiring, preset, backend)


LEVEL = """
import torch
from dfq.engine import Engine
from dfq.student import integer_graph
from dfq_kernels import extension
from hypothesis import given, settings
from tests.layer_networks import network
from tests.test_layer_chains import PRESETS, calibrated, check_wiring
from tests.wired_networks import wirings
for name in ("u-net", "dense block", "channel shuffle block", "squeeze and excitation", "eca", "hardswish", "bilinear"):
    student, images = calibrated(*network(name), "W8A8")
    assert torch.equal(Engine(integer_graph(student))(images), student(images)), name
@settings(max_examples=6, deadline=None, database=None)
@given(wirings(), PRESETS)
def check(wiring, preset):
    check_wiring(wiring, preset, "native")
check()
print(extension.native().isa)
"""


@pytest.mark.skipif(extension.missing("cpu") is not None, reason="no native kernels")
@pytest.mark.parametrize("level", ["baseline", "v3", "v4"])
def test_layers_on_every_instruction_set_level(level: str) -> None:
    environment = {**os.environ, "DFQ_CPU": level, "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", LEVEL], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() <= level


@pytest.mark.parametrize("name", ["u-net", "dense block", "squeeze and excitation", "bilinear", "average uncounted"])
def test_layers_in_interpreted_triton(name: str, wide_tiles: None) -> None:
    if (reason := missing("triton", torch.device("cpu"))) is not None:
        pytest.skip(reason)
    student, images = calibrated(*network(name), "W4A8")
    assert torch.equal(Engine(integer_graph(student), backend="triton")(images[:1]), student(images[:1]))


@pytest.mark.skipif(missing("triton", torch.device("cpu")) is not None, reason="Triton is not interpreted")
@settings(max_examples=4, deadline=None)
@given(wiring=wirings(), preset=PRESETS)
def test_any_wiring_in_interpreted_triton(wiring: Wiring, preset: str) -> None:
    check_wiring(wiring, preset, "triton")


def calibrated(model: nn.Module, shape: tuple[int, ...], preset: str) -> tuple[nn.Module, Tensor]:
    """The student in evaluation mode, and the images that it has seen."""
    images = torch.randn(3, *shape, generator=torch.Generator().manual_seed(5))
    student = dfq.prepare(model, shape, preset=preset)
    dfq.calibrate(student, [images])
    return student.eval().requires_grad_(False), images
