"""From a run to an exported network, and from image files to classes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from dfq import engine
from dfq.cli.app import app
from dfq.data.images import Images, load_images
from dfq.deploy import classify, milliseconds, normalization_of, read_images
from dfq.export import ExportError
from dfq.models import ModelSpec
from dfq.running.checkpoint import CheckpointError
from dfq.student import integer_graph
from tests.conftest import small_net
from tests.integer_networks import exported, input_shape

SPEC = ModelSpec("tests.conftest:small_net", 1, 4)
MNIST = load_images("fashion-mnist", "test").head(40)


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    _, graph = exported("wrn-16-1", "W8A8")
    path = tmp_path_factory.mktemp("network") / "net.safetensors"
    engine.save_graph(replace(graph, normalization=(MNIST.mean, MNIST.std)), path)
    return path


def command(*arguments: object) -> str:
    done = CliRunner().invoke(app, [str(item) for item in arguments])
    assert done.exit_code == 0, done.exception
    return done.stdout


def test_a_run_is_exported_inspected_and_judged(run_small, tmp_path: Path) -> None:
    images = Images(
        torch.randint(0, 256, (30, 1, 12, 12), dtype=torch.uint8), torch.randint(0, 4, (30,)), (0.5,), (0.5,), 4
    )
    result = run_small(spec=SPEC, test_images=images, preset="W4A4")
    out = tmp_path / "out" / "net.safetensors"
    found = json.loads(command("export", result.folder, "-o", out, "--data", "fashion-mnist", "--json"))
    assert found == json.loads(command("inspect", out, "--json"))
    assert found["bytes"] == out.stat().st_size and found["input_shape"] == [1, 12, 12]
    assert [layer["weight_bits"] for layer in found["layers"]] == [8, 4, 4, 4, 8]
    assert found["multiplications_per_image"] == 144 * 72 + 36 * (576 + 576 + 64) + 32
    assert all(0 < layer["bound"] < 2**31 and layer["exact_in_fp32"] for layer in found["layers"])
    table = command("export", result.folder, "-o", out)
    assert "conv3" in table and "largest sum" in table
    loaded = engine.load(out)
    sample = torch.randn(5, 1, 12, 12)
    with torch.no_grad():
        assert torch.equal(loaded(sample), result.model(sample))
    assert result.integers is not None and torch.equal(result.integers(sample), loaded(sample))
    assert result.accuracies["integers"] == result.accuracies["DF-QAT-KD"]
    assert result.sizes["integers"] == (result.folder / "integers.safetensors").stat().st_size
    assert set(result.milliseconds) == {"teacher", "integers"} and min(result.milliseconds.values()) > 0
    facts = json.loads((result.folder / "result.json").read_text())
    assert facts["accuracies"] == result.accuracies and facts["milliseconds"] == result.milliseconds


def test_a_network_that_has_no_integers_is_still_trained(run_small) -> None:
    result = run_small(preset="gdfq-W4A4")
    assert result.integers is None and "integers" not in result.sizes
    assert result.no_integers == "activations='after_relu' leaves values that are not quantized"
    with pytest.raises(ExportError, match="must be quantized, got a float one"):
        integer_graph(result.model)
    with pytest.raises(ValueError, match="student must be a network that dfq.prepare made, got a SmallNet"):
        integer_graph(small_net())


def test_data_must_fit_the_network(run_small) -> None:
    model = run_small().model
    with pytest.raises(ValueError, match=r"export: normalization must be \(mean, std\) of 1 channels"):
        integer_graph(model, normalization_of("cifar10"))
    with pytest.raises(ValueError, match="export: data must be one of .*, got 'mnist'"):
        normalization_of("mnist")
    assert integer_graph(model).normalization is None
    fashion = normalization_of("fashion-mnist")
    assert integer_graph(model, fashion).normalization == (MNIST.mean, MNIST.std)


class NoSteps:
    """An observer that must not see one."""

    def on_step(self, *_: object) -> None:
        raise AssertionError("a step was taken")


WITHOUT_INTEGERS = {
    "a layer norm": [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(8), nn.Linear(8, 4)],
    "a softmax between layers": [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Softmax(1), nn.Linear(8, 4)],
}


@pytest.mark.parametrize("tail", WITHOUT_INTEGERS.values(), ids=WITHOUT_INTEGERS)
def test_what_has_no_integer_network_is_refused_before_the_first_step(run_small, tmp_path: Path, tail: list) -> None:
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), *tail).eval()
    classes = net(torch.zeros(1, 1, 12, 12)).shape[1]
    settings = {"model": net, "num_classes": classes, "preset": "W8A8"}
    with pytest.raises(ExportError, match="export: every call must have an integer form, got floating-point parts: "):
        run_small(observer=NoSteps(), out=tmp_path / "refused", **settings)
    assert not (tmp_path / "refused").exists()
    result = run_small(integers=False, **settings)  # who wants the fake-quantized network alone says so
    assert result.integers is None and result.calibrated is not None


def test_inspect_shows_streams_of_other_bits_than_layers_inputs(network: Path) -> None:
    _, graph = exported("resnet20", "W4A4")
    path = network.parent / "streams.safetensors"
    engine.save_graph(graph, path)
    values = json.loads(command("inspect", path, "--json"))["values"]
    assert {(value["bits"], value["stream"]) for value in values} == {(8, True), (4, False), (8, False)}
    assert sum(value["stream"] for value in values) > 9
    assert "not layers alone (streams)" in command("inspect", path)


def test_nobody_s_pixels_get_fashion_mnist_s_mean(tmp_path: Path, run_small) -> None:
    """A network of other images of the same shape: its file takes pixels only where somebody said how."""
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                        nn.Linear(4, 10)).eval()  # fmt: skip
    settings = {"input_shape": (1, 32, 32), "num_classes": 10, "steps": 1, "spec": SPEC}
    said = run_small(model=net, out=tmp_path / "said", normalization=((0.5,), (0.25,)), **settings)
    assert said.integers is not None and said.integers.graph.normalization == ((0.5,), (0.25,))
    silent = run_small(model=net, out=tmp_path / "silent", **settings)
    assert silent.integers is not None and silent.integers.graph.normalization is None
    with pytest.raises(ValueError, match="engine: images must be normalised: .* --mean and --std"):
        silent.integers.normalize(torch.zeros(1, 1, 32, 32, dtype=torch.uint8))
    done = CliRunner().invoke(app, ["evaluate", str(silent.folder / "integers.safetensors")])
    assert done.exit_code == 1 and "evaluate: data must be given (--data)" in str(done.exception)
    text = command("inspect", silent.folder / "integers.safetensors")
    assert "normalised numbers only" in text
    with pytest.raises(ValueError, match="quantize: normalization must be .* std > 0"):
        run_small(model=net, out=tmp_path / "wrong", normalization=((0.5,), (0.0,)), **settings)
    assert not (tmp_path / "wrong").exists()


def test_pictures_and_arrays_give_the_same_classes(network: Path, tmp_path: Path) -> None:
    loaded, pixels = engine.load(network), MNIST.pixels[:3]
    Image.fromarray(pixels[0, 0].numpy()).save(tmp_path / "a.png")
    np.save(tmp_path / "pixels.npy", pixels.numpy())
    np.save(tmp_path / "numbers.npy", MNIST.normalize(pixels).numpy())
    np.save(tmp_path / "one.npy", pixels[0].numpy())
    expected = classify(loaded, tmp_path / "pixels.npy")
    assert classify(loaded, tmp_path / "numbers.npy") == expected
    assert classify(loaded, tmp_path / "a.png") == classify(loaded, tmp_path / "one.npy") == expected[:1]
    top = [row[0][0] for row in expected]
    assert top == loaded(MNIST.normalize(pixels)).argmax(1).tolist()
    lines = command("run", network, tmp_path / "a.png", tmp_path / "pixels.npy", "--json").splitlines()
    assert [json.loads(line)["classes"][0]["class"] for line in lines] == [top[0], *top]
    text = command("run", network, tmp_path / "a.png", "--backend", "reference")
    assert text.startswith(f"{tmp_path / 'a.png'}[0]: class {top[0]} (")


def test_a_picture_is_scaled_and_made_grey(network: Path, tmp_path: Path) -> None:
    loaded = engine.load(network)
    Image.new("RGB", (50, 20), (255, 255, 255)).save(tmp_path / "white.jpg")
    images = read_images(loaded, tmp_path / "white.jpg")
    assert images.shape == (1, 1, 32, 32)
    assert torch.allclose(images, torch.tensor((1 - MNIST.mean[0]) / MNIST.std[0]))


def test_an_exported_network_is_evaluated(network: Path) -> None:
    found = json.loads(command("evaluate", network, "--json"))
    assert found["images"] == 10000 and found["bytes"] == network.stat().st_size and found["accuracy"] > 50


def test_wrong_files_are_refused(network: Path, tmp_path: Path) -> None:
    loaded = engine.load(network)
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty.npy").write_bytes(b"")
    np.save(tmp_path / "small.npy", np.zeros((1, 28, 28), np.uint8))
    np.save(tmp_path / "int.npy", np.zeros((1, 32, 32), np.int64))
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    for name, text in (
        ("none.npy", "run: .*none.npy cannot be read: No such file"),
        ("text.png", "text.png must be an image: Pillow knows no such format"),
        ("empty.npy", "empty.npy must be a NumPy array"),
        ("small.npy", r"small.npy must be \[N, 1, 32, 32\], got \(1, 1, 28, 28\)"),
        ("int.npy", "int.npy must be uint8 pixels or normalised floating-point numbers, got 'int64'"),
        ("objects.npy", "allow_pickle"),
    ):
        with pytest.raises((ValueError, CheckpointError), match=text):
            read_images(loaded, tmp_path / name)
    _, graph = exported("resnet20", "W8A8")
    with pytest.raises(ValueError, match="exported without --mean and --std"):
        Image.new("RGB", (32, 32)).save(tmp_path / "black.png")
        read_images(engine.Engine(graph), tmp_path / "black.png")


def test_a_time_is_a_time() -> None:
    _, graph = exported("wrn-16-1", "W8A8")
    assert 0.01 < milliseconds(engine.Engine(graph), input_shape("wrn-16-1"), seconds=0.05) < 1000
