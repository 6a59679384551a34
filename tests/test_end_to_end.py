"""The main job in small: a real network, quantized without data, judged on real images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

import dfq
from dfq.config import RECIPES
from dfq.data.images import load_images
from dfq.models import embedded


def test_a_real_network_keeps_its_accuracy_at_eight_bits(tmp_path: Path) -> None:
    images = load_images("fashion-mnist", "test").head(1000)
    recipe = replace(RECIPES["default"], warm_up=12, batch_size=64, width=64)
    result = dfq.quantize(
        embedded.load_teacher(), input_shape=(1, 32, 32), num_classes=10, preset="W8A8", recipe=recipe, steps=6,
        out=tmp_path / "run", test_images=images, spec=embedded.SPEC,
    )  # fmt: skip
    assert result.accuracies["teacher"] > 92
    assert result.accuracies["DF-QAT-KD"] > result.accuracies["teacher"] - 1.0
    assert result.accuracies["analytic"] > result.accuracies["teacher"] - 1.0
    assert result.sizes["DF-QAT-KD"] < 0.35 * result.sizes["teacher"]
    loaded, config = dfq.load_run(tmp_path / "run")
    assert dfq.accuracy(loaded, images, device=torch.device("cpu")) == result.accuracies["DF-QAT-KD"]
    assert config["preset"] == "W8A8" and not result.model.training


def test_training_repairs_what_two_bits_break(tmp_path: Path) -> None:
    images = load_images("fashion-mnist", "test").head(500)
    recipe = replace(
        RECIPES["default"],
        warm_up=25,
        batch_size=64,
        width=64,
        generators=RECIPES["default"].generators[2:],
        rungs=("calibrated", "distilled"),
    )
    result = dfq.quantize(
        embedded.load_teacher(), input_shape=(1, 32, 32), num_classes=10, preset="W2A4", recipe=recipe, steps=40,
        out=tmp_path / "run", test_images=images,
    )  # fmt: skip
    assert result.accuracies["DF-QAT-KD"] > result.accuracies["DF-Q"] + 10
