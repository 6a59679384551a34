"""Arguments of the wrong kind are one line that names them, before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import dfq
from dfq.config import QuantConfig
from dfq.data.images import DataError, Images
from dfq.models import ModelSpec
from dfq.running.device import resolve_precision
from tests.conftest import SMALL_RECIPE, small_net

PIXELS, LABELS = torch.zeros(4, 1, 12, 12, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("keywords", "text"),
    [
        ({"input_shape": 12}, r"input_shape must be \(C, H, W\), got 12"),
        ({"input_shape": (1, 12, 0)}, "input_shape must be an integer of at least 1, got 0"),
        ({"num_classes": 4.0}, "num_classes must be an integer of at least 2, got 4.0"),
        ({"seed": "a"}, "seed must be an integer of at least 0, got 'a'"),
        ({"seed": 1.5}, "seed must be an integer"),
        ({"steps": True}, "steps must be an integer"),
        ({"effort": "quick"}, "effort must be given without recipe, got 'quick'"),
        ({"effort": "slow", "recipe": None}, "effort must be one of instant, quick, full, got 'slow'"),
        ({"recipe": "analytic"}, "steps must be left out with recipe analytic, which trains no whole network, got 4"),
        ({"recipe": 3}, "recipe must be a name or a Recipe, got 3"),
        ({"config": "W4A4", "preset": None}, "config must be a QuantConfig, got 'W4A4'"),
        ({"overrides": {"conv1": (2, 3)}}, "overrides must be LayerBits"),
        ({"device": "cpu:5"}, "device must be auto, cpu, cuda or cuda:N, got 'cpu:5'"),
        ({"model": {"weight": 1}}, "model must be a torch.nn.Module, got dict"),
    ],
)
def test_quantize(run_small, tmp_path: Path, keywords: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text) as error:
        run_small(**keywords)
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_numpy_integers_are_integers(run_small) -> None:
    run_small(input_shape=tuple(np.array([1, 12, 12])), num_classes=np.int64(4), seed=np.int32(3))


def test_pruned_models_are_refused_by_what_to_do(run_small, tmp_path: Path) -> None:
    net = small_net()
    prune.l1_unstructured(net.conv1, "weight", 0.5)
    with pytest.raises(ValueError, match="model must be copyable .remove weight_norm and pruning., got RuntimeError"):
        run_small(model=net)
    prune.remove(net.conv1, "weight")
    run_small(model=net)


def test_distill(tmp_path: Path) -> None:
    common = {"input_shape": (1, 12, 12), "num_classes": 4, "recipe": SMALL_RECIPE, "steps": 1, "out": tmp_path / "run"}
    net = small_net()

    class Auxiliary(type(net)):
        def forward(self, x):
            return (super().forward(x),) * 2 if self.training else super().forward(x)

    class Detached(type(net)):
        def forward(self, x):
            return super().forward(x).detach()

    for students, text in (
        (net, "students must be a list of different networks"), ([], "students must be a list"),
        ([net, net], "students must be a list of different networks"), (["wrn"], "students must be a list"),
        ([Auxiliary()], r"must give logits .*, got \(2, 4\) \(2, 4\)"),
            ([Detached()], "must give logits .* with a gradient in training"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=text):
            dfq.distill(small_net(), students, **common)
    with pytest.raises(ValueError, match="specs must be of teacher and students"):
        dfq.distill(small_net(), [net], specs=[ModelSpec()], **common)
    for recipe in ("analytic", "reconstruct"):
        with pytest.raises(ValueError, match=f"recipe must be one that trains whole networks, got '{recipe}'"):
            dfq.distill(small_net(), [net], **common | {"recipe": recipe, "steps": None})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"labels": LABELS[:, None]}, r"labels must be int64 \[N\], got torch.int64 \(4, 1\)"),
        ({"labels": LABELS[:3]}, r"labels must be int64 \[N\]"),
        ({"labels": LABELS.float()}, r"labels must be int64 \[N\], got torch.float32"),
        ({"labels": LABELS + 4}, r"labels must be in \[0, 4\)"),
        ({"labels": LABELS - 1}, r"labels must be in \[0, 4\)"),
        ({"pixels": PIXELS[0]}, r"pixels must be uint8 \[N, C, H, W\]"),
        ({"pixels": PIXELS.float()}, "pixels must be uint8"),
        ({"mean": (0.1, 0.2, 0.3)}, "mean must be one number per channel"),
        ({"std": (0.0,)}, "std must be one number > 0 per channel"),
    ],
)
def test_images(change: dict, text: str) -> None:
    with pytest.raises(DataError, match=f"Images: {text}"):
        Images(**{"pixels": PIXELS, "labels": LABELS, "mean": (0.5,), "std": (0.5,), "num_classes": 4, **change})


def test_teach(tmp_path: Path) -> None:
    images = Images(PIXELS, LABELS, (0.5,), (0.5,), 4)
    for spec, given, text in (
        ("wrn-10-1", images, "spec must be a ModelSpec"),
        (ModelSpec(), PIXELS, "images must be"),
    ):
        with pytest.raises(ValueError, match=text):
            dfq.teach(spec, given, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: dfq.prepare(small_net(), (1, 12, 12), preset="W9"), "prepare: preset must be one of .*, got 'W9'"),
        (lambda: dfq.prepare(small_net(), (1, 12, 12), preset=8), "prepare: preset must be one of .*, got 8"),
        (lambda: dfq.prepare(small_net(), (1, 12, 12), config="x"), "prepare: config must be a QuantConfig, got 'x'"),
        (lambda: dfq.quant_config(None), "quant_config: preset must be one of .*, got None"),
        (lambda: dfq.calibrate(small_net(), []), "calibrate: student must be a network that dfq.prepare made"),
        (lambda: dfq.export_integers(small_net()), "export: student must be a network that dfq.prepare made"),
        (lambda: dfq.export_onnx(small_net(), "x"), "export: student must be a network that dfq.prepare made"),
        (lambda: dfq.calibrate(dfq.prepare(small_net(), (1, 12, 12)), []), "calibrate: batches must be at least one"),
        (lambda: dfq.calibrate(dfq.prepare(small_net(), (1, 12, 12)), [torch.full((2, 1, 12, 12), torch.nan)]),
         "calibrate: batches must be images that are finite in every layer, got .no range of conv1"),
    ],
)  # fmt: skip
def test_the_functions_of_somebody_s_own_loop_name_themselves(call: Callable[[], object], text: str) -> None:
    with pytest.raises(ValueError, match=f"^{text}") as error:
        call()
    assert "\n" not in str(error.value)


def test_configs() -> None:
    with pytest.raises(ValueError, match="overrides must be LayerBits, as bits, first and last"):
        QuantConfig(first=(8, 8))


def test_load_run_leaves_the_float_model_alone(run_small) -> None:
    folder = run_small().folder
    net = small_net().train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    loaded, _ = dfq.load_run(folder, net)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items()) and net.training
    assert not torch.equal(loaded.get_parameter("conv2.weight"), before["conv2.weight"])
    for wrong, text in ((small_net().half(), "must be float32"), ("net", "must be a torch.nn.Module")):
        with pytest.raises(ValueError, match=f"load_run: model {text}"):
            dfq.load_run(folder, wrong)
    assert isinstance(loaded, nn.Module) and not loaded.training


@pytest.mark.skipif(not hasattr(torch.cpu, "get_capabilities"), reason="this torch does not say what a CPU can do")
@pytest.mark.parametrize(
    ("capabilities", "precision"),
    [
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": True}, "bf16"),
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True}, "fp32"),
        ({"cpu_name": "AMD EPYC", "avx512_bf16": True}, "bf16"),
        ({"cpu_name": "AMD EPYC"}, "fp32"),
        ({"avx512_bf16": True}, "bf16"),
    ],
)
def test_a_cpu_s_own_precision(monkeypatch: pytest.MonkeyPatch, capabilities: dict, precision: str) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert resolve_precision("auto", torch.device("cpu")) == precision
    assert resolve_precision("bf16", torch.device("cpu")) == "bf16"
