"""The command line as a user types it: a process, its output, its exit code."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import dfq_kernels
from dfq.running.checkpoint import save_weights
from tests.command_line import ENVIRONMENT, RUN, dfq_command
from tests.conftest import small_net

FACTORY = ["--model", "tests.conftest:small_net", "--input-shape", "1,12,12", "--num-classes", "4"]
QUANTIZE = ["quantize", *FACTORY, "--steps", "3", "--preset", "W4A4"]


MODELS = {"analytic", "DF-Q", "reconstructed", "DF-QAT-KD"}


def test_quantize_writes_its_folder_and_says_where(tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = dfq_command(*QUANTIZE, "--out", str(out), "--layer-bits", "conv3=W2A3")
    assert done.returncode == 0, done.stderr
    assert f"everything is in {out}" in done.stdout and "DF-QAT-KD" in done.stdout
    names = {path.name for path in out.iterdir()}
    assert names == {"config.json", "metrics.jsonl", "tensorboard", "checkpoint.safetensors", "model.safetensors",
                     "integers.safetensors", "result.json", "images.png", "curves.png"}  # fmt: skip
    config = json.loads((out / "config.json").read_text())
    assert config["config"]["seed"] == 0 and config["config"]["quant"]["overrides"] == {
        "conv3": {"weights": 2, "activations": 3}
    }
    assert config["versions"]["torch"] == str(torch.__version__)
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 1 + 3 * 2 + 1 + 5 + 3
    assert (out / "images.png").read_bytes()[:4] == b"\x89PNG"
    assert list((out / "tensorboard").glob("events*"))


def test_json_is_all_that_is_printed(tmp_path: Path) -> None:
    done = dfq_command(*QUANTIZE, "--out", str(tmp_path / "run"), "--json", "--profile", "--capture", "auto")
    facts = json.loads(done.stdout)
    assert facts["out"] == str(tmp_path / "run") and set(facts["bytes"]) == {*MODELS, "teacher", "integers"}
    assert set(facts["divergences"]) == MODELS >= set(facts["worse"])
    assert 0 < facts["bytes"]["DF-QAT-KD"] < facts["bytes"]["teacher"] and done.stderr == ""
    assert "SGD.step" in (tmp_path / "run" / "profile.txt").read_text()


def test_data_gives_shapes_and_accuracies_and_evaluate_repeats_them(tmp_path: Path) -> None:
    write_images(tmp_path / "images")
    save_weights(small_net(in_channels=3), tmp_path / "net.safetensors")
    common = ["--data", "image-folder", "--data-root", str(tmp_path / "images")]
    done = dfq_command(
        "quantize", "--model", "tests.conftest:small_net", "--model-kwargs", '{"in_channels": 3}',
        "--weights", str(tmp_path / "net.safetensors"), *common, "--steps", "2", "--out", str(tmp_path / "run"),
        "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    again = dfq_command("evaluate", str(tmp_path / "run"), *common, "--json")
    facts = json.loads(again.stdout)
    assert facts["accuracy"] == json.loads(done.stdout)["accuracies"]["DF-QAT-KD"] and facts["images"] == 8
    assert [item["layer"] for item in facts["layers"]] == ["conv1", "conv2", "conv3", "shortcut", "fc"]
    assert all(item["exact_in_fp32"] and 0 < item["bound"] < 2**24 for item in facts["layers"])
    assert facts["layers"] == json.loads((tmp_path / "run" / "result.json").read_text())["layers"]
    shown = dfq_command("evaluate", str(tmp_path / "run"), *common).stdout
    assert "shortcut" in shown and "largest sum" in shown


def write_images(root: Path) -> None:
    """Eight images of four classes in each split."""
    for split in ("train", "test"):
        for index in range(8):
            path = root / split / f"class{index % 4}" / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (12, 12), (index * 30, 255 - index * 30, 128)).save(path)


def test_teach_and_distill(tmp_path: Path) -> None:
    write_images(tmp_path / "images")
    common = ["--data", "image-folder", "--data-root", str(tmp_path / "images")]
    done = dfq_command(
        "teach", "--model", "wrn-10-1", *common, "--epochs", "1", "--batch-size", "4", "--out", str(tmp_path / "t")
    )
    assert done.returncode == 0, done.stderr
    done = dfq_command(
        "distill", "--model", "wrn-10-1", "--weights", str(tmp_path / "t" / "model.safetensors"), *common,
        "--student", "resnet20", "--student", "wrn-10-1", "--recipe", "default", "--steps", "2",
        "--out", str(tmp_path / "d"), "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout)["accuracies"]) == {"teacher", "student"}
    again = dfq_command("evaluate", str(tmp_path / "d"), *common, "--json")
    assert json.loads(again.stdout)["accuracy"] == json.loads(done.stdout)["accuracies"]["student"]


def test_interrupt_and_resume(tmp_path: Path) -> None:
    environment = {**os.environ, **ENVIRONMENT}
    command = [sys.executable, "-c", f"{RUN}main()", "quantize", *FACTORY, "--steps", "4000"]
    command += ["--out", str(tmp_path / "run")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 9:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, text = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT
    assert "dfq: interrupted after step" in text and "continue with --resume" in text and "Traceback" not in text
    done = dfq_command("evaluate", str(tmp_path / "run"))
    assert done.returncode == 1 and "model.safetensors is missing; continue with --resume" in done.stderr


WRONG = {
    "error: build_model: name must be one of": ["quantize", "--model", "resnet99", "--weights", "x", *FACTORY[2:]],
    "error: checkpoint: nothing.pt cannot be read: No such file": ["quantize", *FACTORY, "--weights", "nothing.pt"],
    "error: dfq: weights must be given for the named model": ["quantize", "--model", "resnet18", *FACTORY[2:]],
    "error: dfq: input_shape must be C,H,W": [
        "quantize",
        "--model",
        "tests.conftest:small_net",
        "--input-shape",
        "12",
    ],
    "error: dfq: num_classes must be given for the named model resnet20": [
        "quantize",
        "--model",
        "resnet20",
        "--weights",
        "x",
        "--input-shape",
        "3,12,12",
    ],
    "error: dfq: weights must be given for the named model timm:resnet18": [
        "quantize",
        "--model",
        "timm:resnet18",
        "--input-shape",
        "3,12,12",
    ],
    "error: build_model: name must be an importable package.module:factory, got 'timm:resnet18'": [
        "quantize",
        "--model",
        "timm:resnet18",
        "--weights",
        "x",
        "--input-shape",
        "3,12,12",
    ],
    "error: LayerBits: weights must be in [2, 8], got 1": [*QUANTIZE, "--preset", "W1A8"],
    "error: quantize: preset must be one of": [*QUANTIZE, "--preset", "tiny"],
    "error: quantize: recipe must be one of": [*QUANTIZE, "--recipe", "tiny"],
    "error: prepare: overrides must name a layer": [*QUANTIZE, "--layer-bits", "conv9=W4A4"],
    "error: dfq: layer_bits must be LAYER=W<bits>A<bits>": [*QUANTIZE, "--layer-bits", "conv1:4"],
    "error: build_model: name must be an importable": ["quantize", "--model", "tests.conftest:nothing", *FACTORY[2:]],
    "error: quantize: model must accept images of (3, 12, 12)": [*QUANTIZE, "--input-shape", "3,12,12"],
    "error: dfq: model_kwargs must be a JSON object": [*QUANTIZE, "--model-kwargs", "[1"],
    "error: load_images: cifar10 (test) needs": [*QUANTIZE, "--data", "cifar10", "--data-root", "nowhere"],
    "error: dfq: device must be one that this machine has": [*QUANTIZE, "--device", "cuda:7"],
    "error: dfq: model must be given with stem, got none": ["quantize", "--stem", "imagenet"],
    "error: dfq: model must be given with input_shape, got none": ["quantize", "--input-shape", "1,28,28"],
    "error: dfq: stem must be given with a named model": [*QUANTIZE, "--stem", "imagenet"],
    "error: dfq: model_kwargs must be given with package.module:factory": [
        "quantize",
        "--model",
        "resnet20",
        "--weights",
        "x",
        *FACTORY[2:],
        "--model-kwargs",
        '{"a": 1}',
    ],
    "error: dfq: layer_bits must be LAYER=W<bits>A<bits>, got 'fc=2A4'": [*QUANTIZE, "--layer-bits", "fc=2A4"],
    "error: dfq: input_shape must be C,H,W (or --data given), got '1,²,9'": [*QUANTIZE, "--input-shape", "1,²,9"],
    "error: dfq: capture must be one of auto, on, off, got 'always'": [*QUANTIZE, "--capture", "always"],
    "error: dfq: capture must be auto or off on cpu, got 'on'": [*QUANTIZE, "--capture", "on", "--device", "cpu"],
    "error: run: nowhere/config.json cannot be read: No such file": ["evaluate", "nowhere"],
    "error: run: gone/config.json cannot be read: No such file": ["export", "gone"],
    "error: engine: gone.safetensors cannot be read: ": ["run", "gone.safetensors", "a.png"],
    "error: engine: gone.safetensors cannot be read": ["inspect", "gone.safetensors"],
}


@pytest.mark.parametrize("text", WRONG)
def test_wrong_input_is_one_line_and_exit_code_1(tmp_path: Path, text: str) -> None:
    done = dfq_command(*WRONG[text], cwd=tmp_path)
    assert done.returncode == 1 and text in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_model_without_norms_is_refused(tmp_path: Path) -> None:
    """The installed command, in the folder where the user's module lies."""
    (tmp_path / "plain.py").write_text(
        "from torch import nn\ndef net(): return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(400, 4))\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(Path(sys.executable).parent / "dfq"), "quantize", "--model", "plain:net", *FACTORY[2:], "--out", "run"],
        capture_output=True, text=True, cwd=tmp_path, env=environment,
    )  # fmt: skip
    assert done.returncode == 1 and "teacher must have batch norms" in done.stderr and not (tmp_path / "run").exists()


def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(tmp_path: Path) -> None:
    """A file size limit stands for the disk: the first file past it cannot be written."""
    code = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
    code += "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n" + RUN + "main()"
    out = tmp_path / "run"
    done = subprocess.run([sys.executable, "-c", code, *QUANTIZE, "--out", str(out)], capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert (
        done.stderr.splitlines()[-1]
        == f"error: checkpoint: {out}/checkpoint.safetensors cannot be written: File too large"
    )
    assert not (out / "checkpoint.safetensors").exists() and not list(out.glob(".checkpoint*"))
    resumed = dfq_command(*QUANTIZE, "--out", str(out), "--resume")
    assert resumed.returncode == 0, resumed.stderr


def test_brackets_are_text(tmp_path: Path) -> None:
    out = tmp_path / "[bold]run"
    done = dfq_command(*QUANTIZE, "--out", str(out))
    assert f"everything is in {out}" in done.stdout, done.stderr
    assert "any [gdfq-]W<2-8>A<2-8>" in " ".join(dfq_command("quantize", "--help").stdout.split())


def test_images_of_more_classes_than_the_model_are_refused_before_training(tmp_path: Path) -> None:
    write_images(tmp_path / "images")
    (tmp_path / "images" / "train" / "fifth").mkdir()
    done = dfq_command(
        "quantize", "--model", "tests.conftest:small_net", "--model-kwargs", '{"in_channels": 3}', "--num-classes", "4",
        "--data", "image-folder", "--data-root", str(tmp_path / "images"), "--out", str(tmp_path / "run"),
    )  # fmt: skip
    assert done.returncode == 1 and "test_images must have at most the model's 4 classes, got 5" in done.stderr
    assert not (tmp_path / "run").exists()


def test_the_version_and_the_backend_in_force() -> None:
    assert dfq_command("--version").stdout.strip() == dfq_kernels.__version__
    environment = {**os.environ, "DFQ_BACKEND": "reference"}
    command = [str(Path(sys.executable).parent / "dfq"), "info", "--json"]
    facts = json.loads(subprocess.run(command, capture_output=True, text=True, env=environment).stdout)
    assert set(facts["operators"].values()) == {"reference"}


@pytest.mark.parametrize("command", ["teach", "quantize", "distill", "evaluate", "info"])
def test_help_documents_every_option(command: str) -> None:
    import typer.main

    from dfq.cli.app import app

    click_command = typer.main.get_command(app).commands[command]  # type: ignore[attr-defined]
    shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200", "TERMINAL_WIDTH": "200"})
    text = " ".join(shown.stdout.split())
    for parameter in click_command.params:
        if parameter.name != "help":
            assert parameter.help, parameter.name
            assert parameter.opts[0] in text or parameter.name.upper() in text


def test_info(tmp_path: Path) -> None:
    facts = json.loads(dfq_command("info", "--json").stdout)
    assert facts["operators"]["fake_quant"] == "reference" or facts["operators"]["fake_quant"] == "native"
    assert facts["embedded teacher"]["accuracy"] >= 93.0
    assert dfq_command("info").returncode == 0
