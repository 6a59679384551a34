"""What a run will take, said before it starts; the effort for large images on a CPU; images between black and white."""

from __future__ import annotations

import re
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import dfq
from dfq.arguments import pixel_bounds, recipe_of_effort
from dfq.config import RECIPES
from dfq.method import cost
from dfq.method.cost import Cost, Rates, cost_of, measured_cost
from dfq.method.generator import Generator
from dfq.method.objective import classifier
from dfq.network import capture as capture_network
from tests.conftest import SMALL_RECIPE, small_net, small_run
from tests.test_trainer import task

CPU = torch.device("cpu")


def test_the_steps_are_those_of_the_run() -> None:
    work = task(steps=5)
    names = [work.phase(index) for index in range(work.total_steps)]
    found = measured_cost(work)
    warm_up = sum(name.startswith("generator") for name in names)
    assert found.generator_steps == warm_up + 3 and found.student_steps == 5  # one live step to two student steps
    assert found.generator_seconds > 0 and found.student_seconds > 0 and found.step_bytes > 10_000
    assert found.layers == names.count("reconstruct") and found.layer_seconds > 0
    assert found.seconds == (
        found.generator_seconds * found.generator_steps + found.student_seconds * 5 + found.layer_seconds * found.layers
    )


def test_trying_a_step_changes_nothing() -> None:
    tried, other = task(), task()
    assert measured_cost(tried) is not None
    for index in range(tried.total_steps):
        assert {name: float(value) for name, value in tried.step(index).items()} == {
            name: float(value) for name, value in other.step(index).items()
        }


def test_ten_times_the_images_are_ten_times_the_bytes() -> None:
    few, many = (measured_cost(task(replace(SMALL_RECIPE, batch_size=size))) for size in (8, 80))
    assert many.step_bytes == pytest.approx(10 * few.step_bytes, rel=0.2)


def test_a_recipe_without_images_has_no_cost() -> None:
    assert measured_cost(task(replace(RECIPES["analytic"]))) is None


def test_a_plan_in_words() -> None:
    assert str(Cost(0.5, 0.25, 450, 200, 3_000_000_000)) == (
        "450 generator steps of about 0.5 s, 200 student steps of about 0.25 s: about 5 minutes, 3 GB in a step"
    )
    assert str(Cost(0.1, 0.25, 450, 0, 2 * 10**8)) == "450 generator steps of about 0.1 s: about 45 s, 0.2 GB in a step"
    assert str(Cost(0.1, 0.25, 50, 0, 2 * 10**8, 1.5, 20)) == (
        "50 generator steps of about 0.1 s, 20 layers to fit of about 1.5 s: about 35 s, 0.2 GB in a step"
    )


def test_an_observer_that_asks_is_told_before_the_first_step(tmp_path: Path) -> None:
    heard: list[str] = []

    class Listener:
        def on_start(self, plan: str) -> None:
            heard.append(plan)

        def on_step(self, phase: str, index: int, total: int, metrics) -> None:
            heard.append(phase)

    small_run(tmp_path / "run", observer=Listener())
    assert "generator steps of about" in heard[0] and heard[1] == "analytic"


def test_large_images_on_a_cpu_are_quantized_in_an_instant_and_that_is_said(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="effort is instant, because images of 160x160 take hours on a CPU"):
        result = dfq.quantize(small_net(), input_shape=(1, 160, 160), preset="W8A8", out=tmp_path / "run")
    assert list(result.rungs) == ["analytic"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for effort, recipe, shape, device, name in (
            (None, None, (3, 128, 128), CPU, "default"), ("full", None, (3, 224, 224), CPU, "default"),
            (None, "paper", (3, 224, 224), CPU, "paper"), (None, None, (3, 224, 224), torch.device("cuda"), "default"),
        ):  # fmt: skip
            assert recipe_of_effort(effort, recipe, shape, device, real=False) == name


def test_generated_images_stay_between_black_and_white() -> None:
    low, high = pixel_bounds(((0.5, 0.25), (0.25, 0.5)))
    assert low.tolist() == [-2.0, -0.5] and high.tolist() == [2.0, 1.5]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        free = Generator((2, 12, 12), noise=8, width=8)
    bounded = Generator((2, 12, 12), noise=8, width=8, bounds=(low, high))
    bounded.load_state_dict(free.state_dict() | {"low": bounded.low, "high": bounded.high})
    z = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    assert torch.equal(bounded(z), free(z).clamp(low.view(-1, 1, 1), high.view(-1, 1, 1)))
    assert not torch.equal(bounded(z), free(z)) and pixel_bounds(None) is None


def test_a_run_that_knows_its_pixels_makes_images_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dfq.results import finish

    seen: list[torch.Tensor] = []
    monkeypatch.setattr(finish, "save_image_grid", lambda rows, path: seen.extend(images for _, images, _ in rows))
    small_run(tmp_path / "run", normalization=((0.5,), (1.0,)))
    assert seen and all(-0.5 <= float(images.min()) <= float(images.max()) <= 0.5 for images in seen)


def test_a_limit_of_time_takes_the_best_that_is_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, names = small_net(), []
    network = capture_network(teacher, (1, 12, 12))
    for seconds in (1e-6, 0.025, 0.03, 0.5):  # of an image, in both kinds of steps
        monkeypatch.setattr(cost, "measured_rates", lambda _, rate=seconds: Rates(rate, rate, 1.0))
        names.append(cost.recipe_within(30.0, teacher, network, classifier(4), CPU, "fp32"))
    assert names == ["default", "reconstruct", "few", "analytic"]


def test_layers_take_what_their_images_take() -> None:
    recipe, rates = RECIPES["few"], Rates(0.5, 2.0, 10.0)
    found = cost_of(recipe, rates, trained=0, layers=7)
    assert found.layers == 7 and found.generator_steps == recipe.warm_up and found.step_bytes == 10 * recipe.batch_size
    fit = recipe.fit
    assert found.layer_seconds * 7 == pytest.approx(2.0 * (fit.steps * fit.batch_size + fit.images))
    assert found.seconds == pytest.approx(0.5 * recipe.batch_size * recipe.warm_up + found.layer_seconds * 7)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"minutes": 0}, "quantize: minutes must be a number > 0, got 0"),
        ({"minutes": "5"}, "quantize: minutes must be a number > 0, got '5'"),
        ({"minutes": float("nan")}, "quantize: minutes must be a number > 0, got nan"),
        ({"minutes": 5, "effort": "quick"}, "quantize: minutes must be given without effort, recipe and steps, got 5"),
        ({"minutes": 5, "steps": 10}, "quantize: minutes must be given without effort, recipe and steps, got 5"),
    ],
)
def test_a_limit_of_time_that_is_none(given: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        dfq.quantize(small_net(), input_shape=(1, 12, 12), out=tmp_path / "run", **given)
    assert not (tmp_path / "run").exists()


def test_a_run_with_a_limit_says_what_it_does_and_resumes_as_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []

    class Listener:
        def on_start(self, plan: str) -> None:
            said.append(plan)

        def on_step(self, phase: str, index: int, total: int, metrics) -> None:
            pass

    run = {"input_shape": (1, 12, 12), "preset": "W8A8", "out": tmp_path / "run", "minutes": 1e-9}
    first = dfq.quantize(small_net(), observer=Listener(), **run)
    assert said == ["recipe analytic"] and list(first.rungs) == ["analytic"]
    monkeypatch.setattr(cost, "measured_rates", lambda _: Rates(0.0, 0.0, 0.0))  # now everything would be fast
    assert list(dfq.quantize(small_net(), resume=True, **run).rungs) == ["analytic"]
