"""Networks that are no classifiers of whole images: what their outputs mean, and whole runs on them; real images."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dfq
from dfq.config import GeneratorConfig, Recipe
from dfq.data.images import Images
from dfq.method.losses import distillation, normalised_distance, normalised_squares
from dfq.method.objective import Objective, classifier, objective_of
from dfq.method.pool import ImagePool
from dfq.running.execution import Execution
from tests.conftest import SMALL_RECIPE, SmallNet, small_net

CPU = torch.device("cpu")
UNLABELLED = Recipe(
    "unlabelled", (GeneratorConfig(live=True, snapshots=(0.5,)),), warm_up=2, batch_size=8, noise=8, width=8,
    calibration_batches=2, ranges="lsq",
)  # fmt: skip


class Pixels(SmallNet):
    """Three classes for every pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.mask = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        return F.interpolate(self.mask(self.relu(self.bn2(self.conv2(x)))), scale_factor=2.0, mode="nearest")


class Boxes(SmallNet):
    """Classes and four coordinates, in a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.box = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.pool(self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))).flatten(1)
        return {"classes": self.fc(x), "box": self.box(x)}


def taught(kind: type[SmallNet]) -> SmallNet:
    """With the statistics of images like those that it is judged by: the method takes for granted that they are."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        net = kind().train()
        for module in net.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = None  # the mean over all batches, nothing of the start
        with torch.no_grad():
            for _ in range(5):
                net(torch.randn(32, 1, 12, 12) * torch.linspace(0.1, 1.5, 32).view(-1, 1, 1, 1))
    return net.eval()


def outputs(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.zeros(2, *shape) for shape in shapes]


@pytest.mark.parametrize(
    ("shapes", "given", "kinds"),
    [
        ([(10,)], None, ("classes",)),
        ([(3, 8, 8)], None, ("classes",)),
        ([(1,)], None, ("values",)),
        ([(1, 8, 8)], None, ("values",)),
        ([()], None, ("values",)),
        ([(7, 3)], None, ("values",)),
        ([(10,), (4,)], None, ("values", "values")),
        ([(10,), (4,)], ["classes", "values"], ("classes", "values")),
        ([(10,)], "values", ("values",)),
        ([(10,), (10,)], "classes", ("classes", "classes")),
    ],
)
def test_what_outputs_are_taken_for(shapes, given, kinds) -> None:
    found = objective_of(outputs(*shapes), given, None, owner="quantize", name="model")
    assert found.kinds == kinds and found.shapes == tuple(shapes)


@pytest.mark.parametrize(
    ("shapes", "given", "classes", "text"),
    [
        ([(10,)], "labels", None, "objective must be classes or values, for each of the 1 outputs or one for all, got"),
        ([(10,)], ["classes", "values"], None, "for each of the 1 outputs"),
        ([(10,)], 3, None, "for each of the 1 outputs"),
        ([(1,)], "classes", None, "objective must be values where an output has no dim 1 of two classes or more, got"),
        ([(3, 8, 8)], None, 3, r"model must give logits \[N, num_classes=3\], got \(2, 3, 8, 8\)"),
    ],
)
def test_objectives_that_are_none(shapes, given, classes, text: str) -> None:
    with pytest.raises(ValueError, match=f"quantize: .*{text}"):
        objective_of(outputs(*shapes), given, classes, owner="quantize", name="model")


def test_the_distance_of_pixels_is_the_mean_over_them(random: torch.Generator) -> None:
    teacher, student = torch.randn(2, 4, 3, 5, 6, generator=random)
    rows = [pixels.permute(0, 2, 3, 1).reshape(-1, 3) for pixels in (teacher, student)]
    torch.testing.assert_close(distillation(teacher, student), distillation(*rows))
    pixels, whole = Objective(("classes",), ((3, 5, 6),)), classifier(3)
    torch.testing.assert_close(pixels.divergences(teacher, student).mean(), distillation(*rows))
    for name, value in pixels.entropies(teacher).items():
        torch.testing.assert_close(value, whole.entropies(rows[0])[name])


def test_the_distance_of_values_is_the_share_of_variance_that_is_missed(random: torch.Generator) -> None:
    teacher = 3 + 2 * torch.randn(4096, 8, generator=random)
    noise = torch.randn(4096, 8, generator=random)
    assert float(normalised_squares(teacher, teacher + 0.2 * noise).mean()) == pytest.approx(0.01, rel=0.05)
    assert float(normalised_squares(teacher, teacher.mean(0).expand_as(teacher)).mean()) == pytest.approx(1, rel=1e-4)
    assert float(normalised_distance(teacher, teacher + 0.2)) == pytest.approx(0.1, rel=0.02)
    scaled = normalised_squares(1e3 * teacher, 1e3 * (teacher + 0.2 * noise))
    torch.testing.assert_close(scaled, normalised_squares(teacher, teacher + 0.2 * noise))


def test_values_that_never_change_have_a_finite_distance() -> None:
    constant = torch.full((4, 2), 5.0)
    assert torch.isfinite(normalised_squares(constant, constant + 1)).all()
    assert torch.isfinite(normalised_squares(0 * constant, 0 * constant + 1)).all()


def test_several_outputs_are_summed(random: torch.Generator) -> None:
    both = Objective(("classes", "values"), ((5,), (3,)))
    teacher, student = (
        {"a": torch.randn(6, 5, generator=random), "b": torch.randn(6, 3, generator=random)} for _ in "12"
    )
    apart = distillation(teacher["a"], student["a"]) + normalised_squares(teacher["b"], student["b"]).mean()
    torch.testing.assert_close(both.distance("kl", teacher, student), apart)
    torch.testing.assert_close(both.divergences(teacher, student).mean(), apart)
    assert set(both.entropies(teacher)) == {"instance", "batch"}
    assert Objective(("values",), ((3,),)).entropies(teacher["b"]) == {}


@pytest.mark.parametrize(
    ("kind", "objective", "described"),
    [
        (Pixels, None, "classes [N, 3, 12, 12]"),
        (SmallNet, "values", "values [N, 4]"),
        (Boxes, None, "values [N, 4], values [N, 4]"),
        (Boxes, ["values", "classes"], "values [N, 4], classes [N, 4]"),
    ],
)
def test_networks_with_other_heads_are_quantized(kind, objective, described: str, tmp_path: Path) -> None:
    net = taught(kind)
    image = torch.randn(16, 1, 12, 12, generator=torch.Generator().manual_seed(2)) * torch.linspace(0.1, 1.5, 16).view(
        -1, 1, 1, 1
    )

    def near(network) -> float:
        leaves = [torch.utils._pytree.tree_leaves(model(image)) for model in (net, network)]
        apart = [normalised_squares(wanted, got.float()).mean() for wanted, got in zip(*leaves, strict=True)]
        return float(sum(apart)) / len(apart)

    result = dfq.quantize(
        net, input_shape=(1, 12, 12), preset="W8A8", recipe=UNLABELLED, steps=3, objective=objective, metric=near,
        out=tmp_path / "run", precision="fp32",
    )  # fmt: skip
    assert result.objective == described and result.accuracies == {}
    assert list(result.scores) == ["teacher", "analytic", "DF-QAT-KD", "integers"]
    assert result.scores["teacher"] < 1e-9 and 0 < result.scores["integers"] < 0.05
    terms = {
        name for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines() for name in json.loads(line)
    }
    assert ("generator0/instance" in terms) == ("classes" in described)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["scores"] == result.scores


def test_named_recipes_ask_for_no_labels_where_there_are_none() -> None:
    from dfq.arguments import recipe_asked

    pixels = Objective(("classes",), ((3, 5, 6),))
    assert any(item.conditional for item in recipe_asked("quantize", "default", None, classifier(3))[0].generators)
    recipe, steps = recipe_asked("quantize", "default", None, pixels)
    assert len(recipe.generators) == 3 and not any(item.conditional for item in recipe.generators) and steps == 200


def test_a_recipe_of_ones_own_that_asks_for_labels_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="recipe must be one without conditional generators where images have"):
        dfq.quantize(taught(Pixels), input_shape=(1, 12, 12), recipe=SMALL_RECIPE, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_float_students_with_other_heads(tmp_path: Path) -> None:
    student = taught(Boxes)
    student.load_state_dict({name: 0.5 * value for name, value in student.state_dict().items()})
    recipe = UNLABELLED
    result = dfq.distill(
        taught(Boxes), [student], input_shape=(1, 12, 12), recipe=recipe, steps=2, out=tmp_path / "run",
        objective=["values", "classes"], metric=lambda network: float(network(torch.ones(1, 1, 12, 12))["box"].sum()),
        precision="fp32",
    )  # fmt: skip
    assert list(result.scores) == ["teacher", "student"] and result.scores["teacher"] != result.scores["student"]
    with pytest.raises(ValueError, match=r"students\[0\] must give outputs \[N, 4\] \[N, 4\], got \(2, 4\)"):
        dfq.distill(taught(Boxes), [small_net()], input_shape=(1, 12, 12), recipe=recipe, out=tmp_path / "other")


@pytest.mark.parametrize(
    ("metric", "text"),
    [
        (3, "metric must be a function of a network, got 'int'"),
        (lambda network: "good", "metric must return a number, got str"),
        (lambda network: network(torch.ones(1, 1, 12, 12)).sum() / {}["nothing"], "nothing"),
    ],
)
def test_a_metric_fails_before_the_run(metric, text: str, tmp_path: Path, run_small) -> None:
    with pytest.raises((ValueError, KeyError), match=text):
        run_small(metric=metric)
    assert not (tmp_path / "run").exists()


def pool(real: Tensor | None) -> ImagePool:
    return ImagePool(Execution("off", CPU), batch_size=8, seed=0, device=CPU, precision="fp32", real=real)


def test_half_of_every_batch_is_real(random: torch.Generator) -> None:
    real = 100 + torch.randn(5, 1, 12, 12, generator=random)
    work = pool(real)
    batch = work.batch("student0", 3)
    assert batch.shape == (8, 1, 12, 12) and bool((batch > 50).all())  # no generators: all of them
    assert torch.equal(batch, pool(real).batch("student0", 3))
    assert not torch.equal(batch, work.batch("student0", 4))
    from dfq.method.generator import Generator

    work.frozen = [Generator((1, 12, 12), noise=8, width=8)]
    kinds = (work.batch("student0", 3).flatten(1).mean(1) > 50).tolist()
    assert kinds == [True] * 4 + [False] * 4
    assert bool((work.generated("student0", 3) < 50).all())


def test_ranges_of_real_images_need_no_generator(tmp_path: Path, random: torch.Generator) -> None:
    real = torch.randn(32, 1, 12, 12, generator=random)
    result = dfq.quantize(
        small_net(), input_shape=(1, 12, 12), preset="W8A8", effort="instant", images=real, out=tmp_path / "run",
    )  # fmt: skip
    assert list(result.rungs) == ["analytic", "DF-Q"] and result.divergences == {}
    with torch.no_grad():
        float_of, exact = small_net()(real), result.model(real)
    assert float((float_of - exact).abs().max()) < 0.05 * float(float_of.abs().max())


def test_images_of_a_data_set_are_normalised(tmp_path: Path, run_small) -> None:
    pixels = torch.randint(256, (8, 1, 12, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    few = Images(pixels, torch.zeros(8, dtype=torch.int64), (0.5,), (0.25,), 4)
    by_set = run_small(images=few)
    by_hand = dfq.quantize(
        small_net(), input_shape=(1, 12, 12), num_classes=4, preset="W3A3", recipe=SMALL_RECIPE, steps=4,
        precision="fp32", images=few.normalize(pixels), out=tmp_path / "other",
    )  # fmt: skip
    same = zip(by_set.model.state_dict().values(), by_hand.model.state_dict().values(), strict=True)
    assert all(torch.equal(one, other) for one, other in same)
    without = dfq.quantize(
        small_net(), input_shape=(1, 12, 12), num_classes=4, preset="W3A3", recipe=SMALL_RECIPE, steps=4,
        precision="fp32", out=tmp_path / "without",
    )  # fmt: skip
    assert not torch.equal(without.model(torch.ones(1, 1, 12, 12)), by_set.model(torch.ones(1, 1, 12, 12)))


@pytest.mark.parametrize(
    ("keywords", "text"),
    [
        (
            {"images": torch.zeros(4, 1, 8, 8)},
            r"images must be dfq.data.Images, or a tensor .*, got 'torch.float",
        ),
        ({"images": torch.zeros(0, 1, 12, 12)}, "at least one, got"),
        ({"images": torch.zeros(4, 1, 12, 12, dtype=torch.uint8)}, "got 'torch.uint8"),
        ({"images": [1]}, "got 'list'"),
        ({"images": torch.full((1, 1, 12, 12), float("nan"))}, "images must be finite, got 'NaN or infinity'"),
        ({"images": torch.zeros(4, 1, 12, 12), "recipe": "analytic", "steps": None}, "one that looks at images"),
        (
            {"recipe": "calibrate", "steps": None},
            "recipe must be one with generators, or images given, got",
        ),
    ],
)
def test_images_that_are_none(keywords: dict, text: str, tmp_path: Path, run_small) -> None:
    with pytest.raises(ValueError, match=f"quantize: .*{text}"):
        run_small(**keywords)
    assert not (tmp_path / "run").exists()
