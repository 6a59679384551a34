"""Exported networks in the engine against the trained graph: zero tolerance; and what is not exported."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dfq import engine
from dfq.config import quant_config
from dfq.data.images import load_images
from dfq.engine.graph import IMAGES, Layer, inputs
from dfq.engine.native import NativeNetwork
from dfq.export import ExportError, export
from dfq.quant import freeze_ranges, prepare, set_adapting
from dfq.running.checkpoint import save_weights
from dfq_kernels import extension
from tests.conftest import small_net
from tests.engine_graphs import reference_values, same
from tests.integer_networks import NETWORKS, PRESETS, exact_values, exported, float_network, input_shape, quantized
from tests.test_engine_io import check_written

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
        assert not same(NativeNetwork(graph)(images), expected)
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


# --- export -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "text"),
    [("gdfq-W4A4", "export: the input of .* must be quantized, got a float one"), ("W4A4", None)],
)
def test_what_is_no_integer_network_is_not_exported(preset: str, text: str | None) -> None:
    model = quantized(small_net(), (1, 12, 12), preset)
    if text is None:
        assert {type(step).kind for step in export(model).steps} >= {
            "quantize",
            "layer",
            "average_pool",
        }
        return
    with pytest.raises(ExportError, match=text):
        export(model)


def test_affine_weights_are_not_exported() -> None:
    config = replace(quant_config("W4A4"), weight_scheme="affine")
    model = prepare(small_net(), (1, 12, 12), config)
    set_adapting(model, True)
    model(torch.randn(2, 1, 12, 12))
    freeze_ranges(model)
    with pytest.raises(ExportError, match="weights of conv1 must be symmetric"):
        export(model.eval())


def test_a_residual_is_added_where_it_is_there() -> None:
    """The shortcut's integers are made before the step that adds them, whatever the order of the trained graph."""
    _, graph = exported("resnet18", "W4A4")
    seen = {IMAGES}
    for step in graph.steps:
        assert set(inputs(step)) <= seen
        seen |= set(step.outs)
    assert sum(isinstance(step, Layer) and step.residual is not None for step in graph.steps) == 8


@pytest.mark.parametrize("preset", PRESETS)
def test_exported_networks_are_written(preset: str, tmp_path: Path) -> None:
    _, graph = exported("wrn-16-1", preset)
    check_written(graph, tmp_path)


def test_files_are_small(tmp_path: Path) -> None:
    save_weights(float_network("wrn-16-1"), tmp_path / "float.safetensors")
    whole = (tmp_path / "float.safetensors").stat().st_size
    for preset, most in (("W8A8", 0.28), ("W4A4", 0.15), ("W2A2", 0.09)):
        engine.save_graph(exported("wrn-16-1", preset)[1], tmp_path / "integers.safetensors")
        assert (tmp_path / "integers.safetensors").stat().st_size <= most * whole


LEVEL = """
import torch
from dfq.engine.native import NativeNetwork
from tests.engine_graphs import reference_values, same
from tests.integer_networks import exported, input_shape
for name in ("wrn-16-1", "mobilenet-v2"):
    _, graph = exported(name, "W4A8")
    images = torch.randn(2 if name == "wrn-16-1" else 1, *input_shape(name))
    assert not same(NativeNetwork(graph)(images), reference_values(graph, images)), name
"""


@needs_native
@pytest.mark.parametrize("level", ["baseline", "v3", "v4"])
def test_every_instruction_set_level(level: str) -> None:
    environment = {**os.environ, "DFQ_CPU": level, "PYTHONPATH": str(Path(__file__).parent.parent)}
    environment["DFQ_BACKEND"] = "reference"  # of what makes the network; it is the engine that is tested
    done = subprocess.run([sys.executable, "-c", LEVEL], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
