"""Models by name: sizes known from their papers, any channels and classes, stems, and wrong names."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dfq.data.images import load_images
from dfq.method.generator import Generator, upsample_conv2d
from dfq.models import ModelSpec, build_model, embedded
from dfq.results.evaluate import accuracy

# parameters with 3 channels: ImageNet models with 1,000 classes as published, CIFAR models with 10
PUBLISHED = {
    ("resnet18", "imagenet", 1000): 11_689_512,
    ("resnet34", "imagenet", 1000): 21_797_672,
    ("mobilenet-v2", "imagenet", 1000): 3_504_872,
    ("mobilenet-v1", "imagenet", 1000): 4_231_976,
    ("wrn-40-2", "cifar", 10): 2_243_546,
    ("wrn-16-1", "cifar", 10): 175_066,
}


@pytest.mark.parametrize(("name", "stem", "classes"), PUBLISHED)
def test_parameter_counts(name: str, stem: str, classes: int) -> None:
    model = build_model(ModelSpec(name, 3, classes, stem))
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED[name, stem, classes]


@pytest.mark.parametrize(
    "name", ["wrn-10-2", "resnet18", "resnet34", "resnet20", "vgg11", "mobilenet-v1", "mobilenet-v2"]
)
@pytest.mark.parametrize(("stem", "size"), [("cifar", 32), ("imagenet", 64)])
def test_any_channels_and_classes(name: str, stem: str, size: int) -> None:
    model = build_model(ModelSpec(name, 2, 7, stem)).eval()
    with torch.no_grad():
        assert model(torch.randn(2, 2, size, size)).shape == (2, 7)


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        (ModelSpec("resnet19"), "name must be one of wrn-D-K, resnet18"),
        (ModelSpec("wrn-15-1"), r"depth of wrn-D-K must be 6 n \+ 4"),
        (ModelSpec("wrn-16-0"), "width of wrn-D-K must be at least 1"),
        (ModelSpec("resnet18", in_channels=0), "in_channels must be at least 1"),
        (ModelSpec("resnet18", num_classes=1), "num_classes must be at least 2"),
        (ModelSpec("resnet18", stem="small"), "stem must be one of cifar, imagenet, got 'small'"),
        (ModelSpec("vgg11", stem="small"), "stem must be one of"),
        (ModelSpec("no.such.module:net"), "must be an importable package.module:factory"),
        (ModelSpec("math:sqrt", kwargs={"x": 1}), "math:sqrt must accept"),
        (ModelSpec("builtins:dict"), "builtins:dict must return a torch.nn.Module, got dict"),
    ],
)
def test_wrong_specs(spec: ModelSpec, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        build_model(spec)


def test_factories_get_their_keywords() -> None:
    model = build_model(ModelSpec("torch.nn:Linear", kwargs={"in_features": 3, "out_features": 2}))
    assert isinstance(model, nn.Linear) and model.weight.shape == (2, 3)


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (2, 17, 30)])
@pytest.mark.parametrize("classes", [0, 5])
def test_generated_images_fill_the_normalised_input_space(random: torch.Generator, shape, classes: int) -> None:
    generator = Generator(shape, noise=16, width=16, num_classes=classes)
    labels = torch.randint(classes, (32,), generator=random) if classes else None
    images = generator(torch.randn(32, 16, generator=random), labels)
    assert images.shape == (32, *shape)
    torch.testing.assert_close(images.mean((0, 2, 3)), torch.zeros(shape[0]), rtol=0, atol=1e-4)
    torch.testing.assert_close(images.var((0, 2, 3)), torch.ones(shape[0]), rtol=1e-2, atol=1e-2)


def test_labels_change_the_images(random: torch.Generator) -> None:
    generator = Generator((1, 16, 16), noise=8, width=16, num_classes=3)
    z = torch.randn(4, 8, generator=random)
    one, other = (generator(z, torch.full((4,), label)) for label in (0, 1))
    assert float((one - other).abs().mean()) > 0.05


@pytest.mark.parametrize("size", [(1, 1), (4, 4), (3, 5)])
def test_convolution_of_the_upsampled_map(size: tuple[int, int], random: torch.Generator) -> None:
    x = torch.randn(2, 5, *size, dtype=torch.float64, generator=random).requires_grad_()
    weight = torch.randn(3, 5, 3, 3, dtype=torch.float64, generator=random).requires_grad_()
    expected = F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, padding=1)
    found = upsample_conv2d(x, weight)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    grad = torch.randn(expected.shape, dtype=torch.float64, generator=random)
    pairs = zip(*(torch.autograd.grad(out, (x, weight), grad) for out in (found, expected)), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_generator_width() -> None:
    with pytest.raises(ValueError, match="width must be a positive multiple of 8, got 12"):
        Generator((1, 8, 8), noise=8, width=12)


def test_the_embedded_teacher_has_its_hash_and_its_accuracy() -> None:
    facts = embedded.teacher_facts()
    found = accuracy(embedded.load_teacher(), load_images("fashion-mnist", "test"), device=torch.device("cpu"))
    assert found == pytest.approx(float(str(facts["accuracy"])), abs=0.02) and found >= 93.0
