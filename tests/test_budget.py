"""Bits by budget: the sensitivities, the choice among them, and whole runs."""

from __future__ import annotations

import itertools
import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dfq.api import load_run
from dfq.config import LayerBits, quant_config
from dfq.method.budget import CANDIDATES, Budget, chosen_bits, rounded, sensitivities, weight_counts
from dfq.method.objective import classifier
from dfq.quant import prepare
from dfq.quant.modes import FloatRun
from dfq.quant.quantizers import weight_layers
from dfq.running.loop import Interrupted
from tests.conftest import SMALL_RECIPE, small_net, small_run

COUNTS = {"a": 300, "b": 1000, "c": 70}


def harms(random: torch.Generator) -> dict[str, dict[int, float]]:
    found = {}
    for name in COUNTS:
        values = torch.rand(len(CANDIDATES), generator=random).sort(descending=True).values.tolist()
        found[name] = dict(zip(CANDIDATES, values, strict=True))
    return found


@pytest.mark.parametrize("average", [2.0, 2.7, 4.0, 5.5, 8.0])
def test_the_choice_is_the_best_of_all(average: float, random: torch.Generator) -> None:
    found = harms(random)
    bits = chosen_bits(found, COUNTS, dict.fromkeys(COUNTS, 8), Budget(average_bits=average))
    room = average * sum(COUNTS.values())
    assert sum(COUNTS[name] * bits[name] for name in COUNTS) <= room
    everything = (dict(zip(COUNTS, item, strict=True)) for item in itertools.product(CANDIDATES, repeat=3))
    fitting = [
        item for item in everything if sum(COUNTS[name] * item[name] for name in COUNTS) <= room * (1 - 3 / 2**14)
    ]
    least = min((sum(found[name][item[name]] for name in COUNTS) for item in fitting), default=float("inf"))
    assert sum(found[name][bits[name]] for name in COUNTS) <= least + 1e-12


def test_kept_layers_count_as_they_are(random: torch.Generator) -> None:
    found = {name: values for name, values in harms(random).items() if name != "b"}
    bits = chosen_bits(found, COUNTS, {"a": 8, "b": 3, "c": 8}, Budget(average_bits=3.2, kept=("b",)))
    assert set(bits) == {"a", "c"} and 1000 * 3 + 300 * bits["a"] + 70 * bits["c"] <= 3.2 * 1370


def test_bytes_are_those_of_stored_widths() -> None:
    costs = Budget(weight_bytes=1).costs({"a": 9})["a"]
    assert costs == {2: 3, 3: 5, 4: 5, 5: 9, 6: 9, 7: 9, 8: 9}


def test_chance_does_not_take_bits_away() -> None:
    found = {"a": {2: 0.5, 3: 0.1, 4: 0.2, 5: 0.2, 6: 0.1, 7: 0.1, 8: 0.15}}
    bits = chosen_bits(found, {"a": 10}, {"a": 8}, Budget(average_bits=8.0))
    assert bits["a"] == 6  # three bits are no better than four


def test_a_student_in_floating_point_is_the_network_that_it_was_made_of(random: torch.Generator) -> None:
    net, images = small_net(), torch.randn(16, 1, 12, 12, generator=random)
    student = prepare(net, (1, 12, 12), quant_config("W2A2"))
    torch.testing.assert_close(FloatRun(student)(images), net(images))
    with torch.no_grad():
        other = 2 * net.fc.weight
        torch.testing.assert_close(
            FloatRun(student, {"fc": other})(images), 2 * (net(images) - net.fc.bias) + net.fc.bias
        )


def test_sensitivities_are_of_one_layer_alone(random: torch.Generator) -> None:
    net, images = small_net(), torch.randn(64, 1, 12, 12, generator=random)
    student = prepare(net, (1, 12, 12), quant_config("W4A4"))
    found = sensitivities(student, classifier(4), [images[:32], images[32:]], kept=("conv1",))
    assert set(found) == {"conv2", "conv3", "shortcut", "fc"}
    assert all(row[2] > row[4] > row[8] for row in found.values())
    changed = small_net()
    with torch.no_grad():
        changed.conv3.weight.copy_(rounded(net.conv3.weight, 3))
    apart = classifier(4).divergences(net(images), changed(images)).mean()
    assert float(apart) == pytest.approx(found["conv3"][3], rel=1e-3)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("budget") / "run"
    return small_run(folder, preset="W3A8", average_bits=4.0, overrides={"fc": LayerBits(6, 8)})


def test_a_run_by_average_bits(run) -> None:
    counts = weight_counts(run.model)
    bits = {name: layer.bits for name, layer, _ in weight_layers(run.model)}
    assert bits["fc"] == 6 and "fc" not in run.bits and {name: bits[name] for name in run.bits} == run.bits
    assert sum(counts[name] * bits[name] for name in counts) <= 4.0 * sum(counts.values())
    assert len(set(bits.values())) > 1
    assert list(run.rungs) == ["analytic", "DF-Q", "reconstructed", "DF-QAT-KD"]
    for rung in run.rungs.values():
        assert {name: layer.bits for name, layer, _ in weight_layers(rung)} == bits
    loaded, _ = load_run(run.folder, small_net())
    image = torch.ones(1, 1, 12, 12)
    assert torch.equal(loaded(image), run.model(image)) and torch.equal(run.integers(image), run.model(image))
    assert json.loads((run.folder / "bits.json").read_text()) == run.bits


def test_an_interrupted_run_keeps_the_bits_it_chose(run, tmp_path: Path) -> None:
    class Stop:
        def on_step(self, phase: str, index: int, total: int, metrics) -> None:
            if phase == "reconstruct":
                os.kill(os.getpid(), signal.SIGINT)

    settings = {"preset": "W3A8", "average_bits": 4.0, "overrides": {"fc": LayerBits(6, 8)}}
    with pytest.raises(Interrupted):
        small_run(tmp_path / "cut", observer=Stop(), **settings)
    resumed = small_run(tmp_path / "cut", resume=True, **settings)
    assert resumed.bits == run.bits
    same = zip(run.model.state_dict().values(), resumed.model.state_dict().values(), strict=True)
    assert all(torch.equal(one, other) for one, other in same)


def test_a_run_by_size_fits_into_it(tmp_path: Path) -> None:
    whole = small_run(tmp_path / "whole", preset="W8A8", steps=1)
    size = whole.sizes["integers"] - 500
    run = small_run(tmp_path / "run", preset="W8A8", steps=1, size=size)
    assert (run.folder / "integers.safetensors").stat().st_size <= size and min(run.bits.values()) < 8


@pytest.mark.parametrize(
    ("keywords", "text"),
    [
        ({"average_bits": 1.5}, r"average_bits must be a number in \[2, 8\], got 1.5"),
        ({"average_bits": "4"}, r"average_bits must be a number in \[2, 8\], got '4'"),
        ({"average_bits": 4, "size": 10**6}, "average_bits must be given without size, got 4"),
        ({"size": 100}, "size must be at least [0-9]+ for this network, got 100"),
        ({"average_bits": 2.0, "overrides": {"conv2": LayerBits(8, 8)}}, "average_bits must be at least .* got 2.0"),
        ({"average_bits": 4, "recipe": "analytic", "steps": None}, "recipe must be one with generators, for bits by"),
        ({"size": 10**6, "preset": "gdfq"}, "config must be one of an integer network, for a size, got"),
    ],
)
def test_budgets_that_are_none(keywords: dict, text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"quantize: {text}"):
        small_run(tmp_path / "run", **keywords)
    assert not (tmp_path / "run").exists()


def test_a_recipe_without_analytic_ranges_has_a_budget_too(tmp_path: Path) -> None:
    recipe = replace(SMALL_RECIPE, rungs=("calibrated",))
    run = small_run(tmp_path / "run", recipe=recipe, steps=None, average_bits=5.0)
    assert list(run.rungs) == ["DF-Q"] and run.bits
