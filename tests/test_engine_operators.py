"""The engine as a sequence of operators: on Triton, interpreted where there is no GPU, and captured."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dfq import engine
from dfq.engine import IntegerGraph
from dfq.engine.graph import IMAGES, Grid, Layer, Output, Quantize
from dfq.engine.operators import OperatorNetwork
from dfq.engine.run import missing
from dfq.export import export
from dfq.running.execution import WARM_UP, Execution
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
from tests.random_networks import networks
from tests.recorded_steps import RecordedSteps


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", NETWORKS)
def test_every_integer_on_the_triton_backend(name: str, preset: str, wide_tiles: None) -> None:
    """Interpreted where there is no GPU; activations and weights packed."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if (reason := missing("triton", device)) is not None:
        pytest.skip(reason)
    model, graph = exported(name, preset)
    images = torch.randn(1, *input_shape(name), generator=torch.Generator().manual_seed(4))
    network = OperatorNetwork(graph, device, "triton", Execution("off", device))
    found = {name: value.cpu() for name, value in network.values(images.to(device)).items()}
    expected = exact_values(model, graph, images)
    assert found.keys() == expected.keys() and not same(found, expected)


@pytest.mark.skipif(missing("triton", torch.device("cpu")) is not None, reason="Triton is not interpreted")
@settings(max_examples=60, deadline=None)
@given(graph=networks(), count=st.integers(1, 2), seed=st.integers(0, 2**31))
def test_layers_of_any_shape_in_triton(graph: IntegerGraph, count: int, seed: int) -> None:
    device = torch.device("cpu")
    images = 3 * torch.randn(count, *graph.input_shape, generator=torch.Generator().manual_seed(seed))
    found = OperatorNetwork(graph, device, "triton", Execution("off", device)).values(images)
    assert not same(found, reference_values(graph, images))


def test_weights_whose_packed_sums_leave_int32_are_bytes() -> None:
    """A linear layer of 160,000 inputs."""
    weight = torch.full((1, 160000), 7, dtype=torch.int8)
    steps = (
        Quantize(IMAGES, ("x",), None),
        Layer("x", ("logits",), None, "head", weight, 4, torch.ones(1), torch.zeros(1), None),
    )
    graph = IntegerGraph((40000, 2, 2), {"x": Grid(1.0, 0, 0, 255)}, steps, (Output("logits", (1,)),))
    assert reference_values(graph, torch.full((1, 40000, 2, 2), 255.0))["logits"].item() == 255 * 7 * 160000


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_captured_network_is_replayed(backend: str, wide_tiles: None) -> None:
    """By a stand-in for CUDA graphs that runs a call's operators again: no value is read in between."""
    device = torch.device("cpu")
    if (reason := missing(backend, device)) is not None:
        pytest.skip(reason)
    model = quantized(small_net(), (1, 12, 12), "W4A4")
    graph = export(model)
    execution = Execution("on", device, recorder=RecordedSteps(list))
    network = OperatorNetwork(graph, device, backend, execution)
    for count in (2, 3):
        for _ in range(WARM_UP + 2):
            images = torch.randn(count, 1, 12, 12)
            (name, first), *others = network(images).items()
            assert not others and torch.equal(first, model(images))
            assert torch.equal(network(-images)[name], model(-images)) and torch.equal(first, model(images))
        with pytest.raises(ValueError, match="engine: images must be numbers, got NaN"):
            network(torch.full((count, 1, 12, 12), float("nan")))
    assert execution.recorded == [2, 3]


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(graph=networks(), seed=st.integers(0, 2**31))
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_steps_of_every_kind_are_replayed(backend: str, wide_tiles: None, graph: IntegerGraph, seed: int) -> None:
    """None of them reads a value; results are the caller's, whatever runs next."""
    device = torch.device("cpu")
    if (reason := missing(backend, device)) is not None:
        pytest.skip(reason)
    random = torch.Generator().manual_seed(seed)
    network = OperatorNetwork(graph, device, backend, Execution("on", device, recorder=RecordedSteps(list)))
    before: dict[str, torch.Tensor] = {}
    for _ in range(WARM_UP + 2):
        kept = {name: value.clone() for name, value in before.items()}
        images = 3 * torch.randn(2, *graph.input_shape, generator=random)
        found, expected = network(images), reference_values(graph, images)
        assert found.keys() == {output.value for output in graph.outputs} and not same(found, expected)
        assert all(torch.equal(before[name], value) for name, value in kept.items())
        before = found
    assert network.execution.recorded == [2]


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 5, 128])
@pytest.mark.parametrize("name", ["wrn-16-1", "mobilenet-v2"])
def test_a_gpu_gives_the_same_bits(name: str, batch: int) -> None:
    """As they are, when they are captured, and in every replay."""
    _, graph = exported(name, "W4A4")
    on_gpu, reference = engine.Engine(graph, "cuda", "triton", "on"), engine.Engine(graph, backend="reference")
    for _ in range(WARM_UP + 2):
        images = torch.randn(batch, *input_shape(name))
        assert torch.equal(on_gpu(images).cpu(), reference(images))
    assert on_gpu._network.execution.recorded == [batch]
