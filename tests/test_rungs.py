"""What a quantized network becomes before it is trained as a whole: ranges from batch norms, layers fitted in turn."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from dfq.config import RECIPES, LayerFit, quant_config
from dfq.data.images import load_images
from dfq.method import reconstruct
from dfq.method.analytic import analytic_ranges
from dfq.method.noise import Moments, image_moments, pink_noise
from dfq.method.reconstruct import FloatWalk, Reconstruction, Walk
from dfq.method.teacher import freeze, teacher_graph
from dfq.models.embedded import load_teacher
from dfq.network import capture
from dfq.quant import freeze_ranges, learn_ranges, prepare
from dfq.quant.modes import batch_statistics
from dfq.results.evaluate import accuracy
from tests.conftest import SMALL_RECIPE, small_net

CPU = torch.device("cpu")


def moments_of(model: nn.Module, shape: tuple[int, int, int]) -> Moments:
    return image_moments(teacher_graph(capture(freeze(model), shape)), shape, CPU)


class Shifted(nn.Module):
    """A network that takes its images with another mean and deviation."""

    def __init__(self, model: nn.Module, mean: float, deviation: float) -> None:
        super().__init__()
        self.model, self.mean, self.deviation = model, mean, deviation

    def forward(self, x: Tensor) -> Tensor:
        return self.model((x - self.mean) / self.deviation)


@pytest.mark.parametrize(("mean", "deviation"), [(0.0, 1.0), (0.3, 0.05), (120.0, 60.0), (-5.0, 0.5)])
def test_the_first_batch_norm_remembers_the_images(mean: float, deviation: float) -> None:
    found = moments_of(Shifted(load_teacher(), mean, deviation), (1, 32, 32))
    assert float(found.mean) == pytest.approx(mean, abs=0.05 * deviation)
    assert found.deviation == pytest.approx(deviation, rel=0.1) and not found.assumed


def test_every_channel_has_its_mean() -> None:
    random = torch.Generator().manual_seed(1)
    means = torch.tensor([0.5, -2.0, 3.0])
    net = nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1), nn.BatchNorm2d(32, momentum=None), nn.ReLU(), nn.Flatten(),
                        nn.Linear(32 * 64, 4))  # fmt: skip
    with torch.no_grad():
        net.train()(means.view(3, 1, 1) + 0.5 * pink_noise(64, (3, 16, 16), random))
    found = moments_of(net.eval(), (3, 16, 16))
    assert torch.allclose(found.mean, means, atol=0.05) and found.deviation == pytest.approx(0.5, rel=0.1)


def test_without_an_affine_map_to_it_images_are_normalised_ones() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(400, 4)).eval()
    found = moments_of(net, (1, 12, 12))
    assert not found.mean.any() and found.deviation == 1.0 and found.assumed


def test_noise_has_mean_0_deviation_1_and_neighbours_alike() -> None:
    noise = pink_noise(64, (3, 32, 32), torch.Generator().manual_seed(0))
    assert abs(float(noise.mean())) < 0.05 and float(noise.std()) == pytest.approx(1, rel=0.05)
    apart = [float((noise - noise.roll(by, 3)).square().mean()) for by in (1, 4, 16)]
    assert apart[0] < 0.7 * apart[1] < 0.7 * apart[2]
    assert float((noise[:, 0] - noise[:, 1]).square().mean()) < 0.5  # of one photograph


@pytest.mark.parametrize(("preset", "least"), [("W8A8", 93.4), ("W4A8", 92.5)])
def test_analytic_ranges_need_no_image(preset: str, least: float) -> None:
    student = prepare(load_teacher(), (1, 32, 32), quant_config(preset))
    analytic_ranges(student, Moments(torch.zeros(1), 1.0))
    freeze_ranges(student)
    assert accuracy(student.eval(), load_images("fashion-mnist", "test"), device=CPU) >= least


def test_batch_norms_are_afterwards_what_they_were() -> None:
    student = prepare(small_net(), (1, 12, 12), quant_config("W4A4")).eval()
    before = {name: value.clone() for name, value in student.state_dict().items() if ".bn." in name}
    with batch_statistics(student), torch.no_grad():
        student(torch.randn(8, 1, 12, 12))
        moved = student.state_dict()
        assert any(not torch.equal(moved[name], value) for name, value in before.items())
    after = student.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items()) and not student.training


def test_the_ranges_after_a_batch_norm_do_not_depend_on_the_noise() -> None:
    ranges = []
    for deviation in (1.0, 100.0):
        student = prepare(small_net(), (1, 12, 12), quant_config("W8A8"))
        analytic_ranges(student, Moments(torch.zeros(1), deviation))
        state = student.state_dict()
        names = [name for name in state if name.endswith("running_max")]
        ranges.append(torch.stack([state[name] for name in names]))
    ratio = ranges[1] / ranges[0]
    assert float(ratio.max()) > 50 and float(ratio.median()) == pytest.approx(
        1, rel=0.05
    )  # the image's own, the others'


def test_analytic_ranges_need_batch_norms() -> None:
    plain = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(400, 4))
    with pytest.raises(ValueError, match="analytic_ranges: student must have batch norms, got none"):
        analytic_ranges(prepare(plain, (1, 12, 12), quant_config("W8A8")), Moments(torch.zeros(1), 1.0))


# --- layer by layer ---------------------------------------------------------------------------------------------------


def student_and_self(preset: str = "W3A3") -> tuple[nn.Module, nn.Module]:
    config = quant_config(preset, ranges="lsq")
    exact = prepare(small_net().eval(), (1, 12, 12), config)
    student = copy.deepcopy(exact)
    analytic_ranges(student, Moments(torch.zeros(1), 1.0))
    learn_ranges(student, config)
    return student, exact


def walked(walk: Walk) -> Tensor:
    results = []
    for place, node in enumerate(walk.nodes):
        if node.op == "output":
            results = [values[node.args[0]] for values in walk.values]
        walk.run(place)
    assert not any(walk.values)  # everything is let go
    return torch.cat(results)


def test_walks_compute_what_the_networks_compute() -> None:
    student, exact = student_and_self()
    images = torch.randn(8, 1, 12, 12)
    student.train(), exact.train()
    with torch.no_grad():
        assert torch.equal(
            walked(Walk(student, images.split(3))), torch.cat([student(part) for part in images.split(3)])
        )
        wanted = small_net().eval()(images)
        assert torch.allclose(walked(FloatWalk(exact, images.split(3))), wanted, rtol=1e-4, atol=1e-5)


def test_layers_get_nearer_to_their_float_selves() -> None:
    student, exact = student_and_self()
    images, held = torch.randn(64, 1, 12, 12), torch.randn(64, 1, 12, 12)
    wanted = small_net().eval()(held).detach()
    before = float((student.eval()(held).detach() - wanted).square().mean())
    fit = Reconstruction(student, exact, [images], LayerFit(64, 60, 32), seed=0)
    losses = [fit.step(index) for index in range(fit.steps)]
    assert sum(float(terms["layer/after"] < terms["layer/before"]) for terms in losses) >= len(losses) - 1
    assert float((student.eval()(held).detach() - wanted).square().mean()) < 0.7 * before
    assert torch.equal(exact.state_dict()["conv2.weight"], small_net().state_dict()["conv2.weight"])


def test_large_images_are_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    _, exact = student_and_self()
    monkeypatch.setattr(reconstruct, "LEAST", 1)
    counts = [reconstruct.images_in_memory(exact, torch.zeros(1, 1, 12 * side, 12 * side)) for side in (1, 2)]
    assert counts[0] == pytest.approx(4 * counts[1], rel=0.2)
    monkeypatch.setattr(reconstruct, "LEAST", 10**9)
    assert reconstruct.images_in_memory(exact, torch.zeros(1, 1, 12, 12)) == 10**9


class Twice(nn.Module):
    """One convolution called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(1, 1, 3, padding=1), nn.BatchNorm2d(1), nn.Linear(144, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(x)))
        return self.fc(torch.relu(self.conv(x)).flatten(1))


def test_a_shared_weight_is_fitted_to_the_first_of_its_layers() -> None:
    config = quant_config("W3A3", ranges="lsq")
    exact = prepare(Twice().eval(), (1, 12, 12), config)
    student = copy.deepcopy(exact)
    analytic_ranges(student, Moments(torch.zeros(1), 1.0))
    learn_ranges(student, config)
    fit = Reconstruction(student, exact, [torch.randn(16, 1, 12, 12)], LayerFit(16, 5, 8), seed=0)
    fit.step(0)
    first = student.get_parameter("conv.weight").clone()
    fit.step(1)
    assert torch.equal(student.get_parameter("conv.weight"), first)
    assert not torch.equal(first, exact.get_parameter("conv.weight"))


# --- as runs ----------------------------------------------------------------------------------------------------------


def test_instant_makes_no_image(run_small, tmp_path) -> None:
    result = run_small(effort="instant", recipe=None, steps=None)
    facts = json.loads((tmp_path / "run" / "result.json").read_text())
    assert facts["images"].keys() == {"mean", "deviation", "assumed"}
    assert set(result.rungs) == {"analytic"} and result.rungs["analytic"] is result.model and not result.divergences
    assert not (tmp_path / "run" / "images.png").exists() and result.integers is not None
    assert torch.equal(result.integers(images := torch.randn(4, 1, 12, 12)), result.model(images))


def test_calibration_alone_is_the_product(run_small) -> None:
    result = run_small(recipe=replace(SMALL_RECIPE, rungs=("calibrated",)), steps=None, preset="W2A2")
    assert (
        set(result.rungs) == {"DF-Q"} and result.rungs["DF-Q"] is result.model and set(result.divergences) == {"DF-Q"}
    )


def test_a_rung_that_is_further_from_the_teacher_is_said(run_small) -> None:
    ruined = replace(SMALL_RECIPE, fit=LayerFit(16, 20, 4, learning_rate=1.0))
    result = run_small(recipe=ruined)
    assert "reconstructed" in result.worse and result.divergences["reconstructed"] > result.divergences["DF-Q"]


@pytest.mark.parametrize(
    ("keywords", "text"),
    [
        ({"rungs": ()}, "rungs must be some of analytic, calibrated, reconstructed, distilled, in this order"),
        ({"rungs": ("distilled", "calibrated")}, "rungs must be some of .* in this order"),
        ({"rungs": ("reconstructed", "distilled")}, "rungs must be with analytic or calibrated first"),
        ({"distance": "l2"}, "distance must be one of kl, l1, got 'l2'"),
        ({"steps": 0}, "steps must be > 0"),
    ],
)
def test_recipes_that_are_none(keywords: dict, text: str) -> None:
    with pytest.raises(ValueError, match=f"Recipe: {text}"):
        replace(RECIPES["default"], **keywords)


@pytest.mark.parametrize(
    ("keywords", "text"),
    [
        ({"steps": 0}, "steps must be an integer of at least 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be > 0, got 0.0"),
    ],
)
def test_fits_that_are_none(keywords: dict, text: str) -> None:
    with pytest.raises(ValueError, match=f"LayerFit: {text}"):
        LayerFit(**keywords)


@pytest.mark.parametrize(
    ("rungs", "follows"), [(("analytic", "distilled"), False), (("calibrated", "distilled"), True)]
)
def test_ranges_of_batch_norms_hardly_follow_generated_images(rungs: tuple[str, ...], follows: bool) -> None:
    from tests.test_trainer import task

    work = task(replace(SMALL_RECIPE, rungs=rungs, generators=SMALL_RECIPE.generators[:1]), quant_config("W8A8"))
    first = work.first_step("student")
    for index in range(first):
        work.step(index)
    before = work.students[0].get_buffer("quantizers.x_8.running_max").clone()
    work.pool.batch = lambda purpose, step: torch.full((8, 1, 12, 12), 50.0)  # type: ignore[method-assign]
    work.student_step(0, 0)
    moved = float((work.students[0].get_buffer("quantizers.x_8.running_max") - before) / (50 - before))
    assert moved == pytest.approx(0.1 if follows else 0.001, rel=1e-2)
