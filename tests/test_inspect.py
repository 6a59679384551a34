"""What a network is made of: every value, every step, every part in floating point; and its picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from typer.testing import CliRunner

import dfq
from dfq import engine
from dfq.cli.app import app
from dfq.config import TeachConfig
from dfq.data.images import Images
from dfq.engine.inspect import facts
from dfq.engine.step_times import timed
from dfq.models import ModelSpec
from dfq.quant.inspect import student_facts
from dfq.student import integer_graph
from dfq_kernels import extension
from tests.integer_networks import exported

needs_native = pytest.mark.skipif(extension.missing("cpu") is not None, reason="no native kernels")


def command(*arguments: object) -> str:
    done = CliRunner().invoke(app, [str(item) for item in arguments], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.exception
    return done.stdout


class Mixed(nn.Module):
    """Integer layers, and three parts that stay in floating point: 2 x (4 x 16 x 16) products of matrices there."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(1, 4, 3, 3), nn.BatchNorm2d(4)
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(self.bn(self.conv(x)).relu().flatten(2).transpose(1, 2))
        weights = torch.matmul(tokens, tokens.transpose(1, 2)).softmax(-1)
        return self.head(torch.matmul(weights, tokens).mean(1))


def mixed(num_classes: int = 4, in_channels: int = 1) -> nn.Module:
    """As `ModelSpec` builds it by name."""
    return Mixed()


def test_a_student_says_what_stays_in_floating_point() -> None:
    student = dfq.prepare(Mixed().eval(), (1, 12, 12), preset="W8A8")
    dfq.calibrate(student, [torch.randn(4, 1, 12, 12)])
    found = json.loads(json.dumps(student_facts(student)))
    assert student.training
    matrices, layers = 2 * 16 * 16 * 4, 16 * 36 + 16
    assert found["multiplications_per_image"] == matrices + layers
    assert found["integer_share"] == pytest.approx(layers / (matrices + layers))
    counts = [(item["module"], item["call"], item["multiplications"]) for item in found["floats"]]
    assert ("norm", "aten.layer_norm.default", 0) in counts
    assert counts.count(("", "aten.matmul.default", matrices // 2)) == 2
    assert sum(count for *_, count in counts) == matrices
    assert all(item["why"] for item in found["floats"])
    rows = found["sequence"]
    assert [row["name"] for row in rows if row["weight_bits"]] == ["conv", "head"]
    assert sum(row["share"] for row in rows) == pytest.approx(1)
    assert sum(not row["integer"] for row in rows) == len(found["floats"])
    images, product, pooled = found["values"]
    assert images["shape"] == [1, 12, 12] and images["signed"] and images["bits"] == 8 and images["scale"] > 0
    assert product["shape"] == [16, 4] and product["made_by"] == "quantize"
    assert pooled["shape"] == [4] and pooled["made_by"] == "reduction"


def test_attention_s_products_are_counted() -> None:
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.attend = nn.Conv2d(1, 8, 3, 3), nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            tokens = self.conv(x).flatten(2).transpose(1, 2)
            return self.attend(tokens, tokens, tokens, need_weights=False)[0]

    student = dfq.prepare(Attending().eval(), (1, 12, 12), preset="W8A8")
    found = student_facts(student)
    counts = {item["call"]: item["multiplications"] for item in found["floats"]}
    assert counts["aten.scaled_dot_product_attention.default"] == 2 * 16 * 16 * 8


def test_a_student_and_its_integers_agree() -> None:
    model, graph = exported("wrn-16-1", "W4A4")
    student, integers = student_facts(model), facts(graph)
    assert student["floats"] == integers["floats"] == [] and student["integer_share"] == 1
    assert student["multiplications_per_image"] == integers["multiplications_per_image"]
    wanted = [(row["layer"], row["multiplications"], row["bound"]) for row in integers["layers"]]
    assert [(row["layer"], row["multiplications"], row["bound"]) for row in student["layers"]] == wanted
    grids = {(value["scale"], value["zero_point"], value["bits"]) for value in integers["values"]}
    assert grids <= {(value["scale"], value["zero_point"], value["bits"]) for value in student["values"]}


def test_layers_without_quantized_inputs_are_no_integers(run_small) -> None:
    result = run_small(preset="gdfq-W4A4", steps=1)
    written = json.loads((result.folder / "result.json").read_text())
    assert 0 < result.integer_share < 1 and written["integer_share"] == result.integer_share
    assert {item["why"] for item in written["floating_point"]} == {"its input is not quantized"}


@needs_native
def test_every_step_of_a_file_has_a_row_and_a_time(tmp_path: Path) -> None:
    _, graph = exported("resnet20", "W8A8")
    path, picture = tmp_path / "net.safetensors", tmp_path / "net.png"
    engine.save_graph(graph, path)
    found = json.loads(command("inspect", path, "--picture", picture, "--json"))
    rows = found["sequence"]
    assert len(rows) == len(graph.steps) and [row["kind"] for row in rows] == [step.kind for step in graph.steps]
    assert {value["value"] for value in found["values"]} == set(graph.grids)
    for row in rows:
        assert row["milliseconds"] is None if row["runs_with"] else row["milliseconds"] > 0
    assert found["milliseconds"] > 0 and found["threads"] == torch.get_num_threads()
    with Image.open(picture) as image:
        assert image.width > 900 and image.height > 15 * len(rows)
    text = command("inspect", path)
    assert all(name in text for name in graph.grids) and "steps, in order" in text and "in floating point" not in text


@needs_native
def test_steps_that_run_inside_of_others_have_no_time_of_their_own() -> None:
    class Gelu(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(1, 4, 3), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(nn.functional.gelu(self.conv(x)).mean((2, 3)))

    student = dfq.prepare(Gelu().eval(), (1, 8, 8), preset="W8A8")
    dfq.calibrate(student, [torch.randn(4, 1, 8, 8)])
    graph = integer_graph(student)
    found = timed(facts(graph), graph, seconds=0.01)
    table = next(row for row in found["sequence"] if row["kind"] == "table")
    conv = next(row for row in found["sequence"] if row["name"] == "conv")
    assert table["milliseconds"] is None and table["runs_with"] == conv["makes"][0] and conv["milliseconds"] > 0


def test_a_run_with_parts_in_floating_point_is_shown_and_drawn(run_small, tmp_path: Path) -> None:
    spec = ModelSpec("tests.test_inspect:mixed", 1, 4)
    result = run_small(model=Mixed().eval(), preset="W8A8", steps=1, integers=False, spec=spec)
    written = json.loads((result.folder / "result.json").read_text())
    assert written["integer_share"] == result.integer_share < 1 and len(written["floating_point"]) == len(result.floats)
    picture = tmp_path / "net.png"
    text = command("inspect", result.folder, "--picture", picture)
    assert "in integers: 22.4 % of the multiplications; in floating point:" in text
    assert "aten.layer_norm.default" in text and "norm" in text and "no integer form is known" in text
    found = json.loads(command("inspect", result.folder, "--json"))
    assert found["floats"] == written["floating_point"] and picture.read_bytes()[1:4] == b"PNG"


def test_a_run_with_parts_in_floating_point_is_exported_as_onnx_alone(run_small, tmp_path: Path) -> None:
    spec = ModelSpec("tests.test_inspect:mixed", 1, 4)
    run = run_small(model=Mixed().eval(), preset="W8A8", steps=1, integers=False, spec=spec).folder
    onnx, integers = tmp_path / "net.onnx", tmp_path / "integers.safetensors"
    shown = command("export", run, "--onnx", onnx, "-o", integers)
    assert f"{onnx} is written; {integers} is not: " in shown and onnx.exists() and not integers.exists()
    found = json.loads(command("export", run, "--onnx", onnx, "-o", integers, "--json"))
    assert found["onnx"] == str(onnx) and found["file"] is None and found["floating_point"] >= 3


def test_a_run_of_integers_shows_what_its_file_shows(run_small) -> None:
    result = run_small(spec=ModelSpec("tests.conftest:small_net", 1, 4), steps=1)
    run = json.loads(command("inspect", result.folder, "--json"))
    file = json.loads(command("inspect", result.folder / "integers.safetensors", "--json"))
    assert all(run[key] == file[key] for key in file if key not in ("file", "bytes"))


def test_a_float_run_is_refused_in_one_line(tmp_path: Path) -> None:
    images = Images(torch.zeros(8, 1, 12, 12, dtype=torch.uint8), torch.zeros(8, dtype=torch.long), (0.5,), (0.5,), 4)
    spec = ModelSpec("tests.conftest:small_net", 1, 4)
    dfq.teach(spec, images, config=TeachConfig(epochs=1, batch_size=4), out=tmp_path / "run")
    done = CliRunner().invoke(app, ["inspect", str(tmp_path / "run")])
    assert str(done.exception) == (
        f"inspect: network must be a run whose network is quantized, got '{tmp_path / 'run'}'"
    )  # fmt: skip
