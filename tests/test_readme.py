"""The README tells the truth: its tables come from committed results, its example and its commands run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import benchmarks.readme as readme
from dfq.models import embedded

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()


def examples() -> list[str]:
    return re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def test_tables_are_not_stale() -> None:
    assert readme.build(TEXT) == TEXT, "run `make readme`"
    assert TEXT.count("<!-- end -->") == 11


def test_the_measured_teacher_is_the_embedded_one() -> None:
    assert json.loads(readme.ACCURACY.read_text())["teacher"] == embedded.teacher_facts()["accuracy"]


def test_the_python_example_runs(tmp_path: Path, monkeypatch) -> None:
    """With fewer steps and images, so that it takes seconds."""
    example, *_ = examples()
    assert "steps=200" in example
    example = example.replace("steps=200", "steps=1, recipe=SMALL").replace('recipe="default",', "")
    example = example.replace("test_images=images", "test_images=images.head(50)")
    monkeypatch.chdir(tmp_path)
    from dfq.config import GeneratorConfig, Recipe

    small = Recipe("small", (GeneratorConfig(),), warm_up=1, batch_size=4, width=8, noise=8, calibration_batches=1)
    exec(compile(example, "README.md", "exec"), {"SMALL": small})
    assert (tmp_path / "run" / "result.json").exists()


@pytest.mark.parametrize("number", [1, 2, 3])
def test_the_other_examples_print_what_they_say(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    example = examples()[number]
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip() == example.rpartition("# ")[2].strip()


def test_commands_of_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make ([\w-]+)", TEXT):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    from dfq.cli.app import app

    known = {command.callback.__name__ for command in app.registered_commands if command.callback}
    assert set(re.findall(r"^dfq (\w+)", TEXT, re.MULTILINE)) <= known


def test_ci_runs_the_readme_s_test_command() -> None:
    commands = (ROOT / ".ci" / "run").read_text().splitlines()
    assert {"make test", "make test-long"} <= {*commands} and "make test " in TEXT and "make test-long" in TEXT
