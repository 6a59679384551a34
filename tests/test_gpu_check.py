"""The check of the first minutes on a GPU: its dry run goes through every stage, and its runner stops at nothing."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.machine import UNKNOWN
from dfq_kernels.dispatch import missing
from tools.gpu_check import stages
from tools.gpu_check.collect import collect
from tools.gpu_check.notes import Notes, read_rows, without_numbers
from tools.gpu_check.runner import ABSENT, NO_TIME, OK, RED, ROOT, TIMED_OUT, Outcome, Stage, run, table

MOST_FILES = 8  # in the output folder: few enough to carry anywhere


def numbers(value: Any) -> list[float]:
    """Every fraction in a row."""
    if isinstance(value, dict):
        value = list(value.values())
    return [item for part in value for item in numbers(part)] if isinstance(value, list) else (
        [value] if isinstance(value, float) else []
    )  # fmt: skip


@pytest.mark.long
@pytest.mark.skipif(missing("fake_quant", "native", "cpu") is not None, reason="no native kernels")
@pytest.mark.skipif(missing("int_conv2d", "triton", "cpu") is not None, reason="Triton is not interpreted")
def test_the_dry_run_goes_through_every_stage(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tools.gpu_check", "--dry", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    found = "".join(path.read_text()[-3000:] for path in sorted(tmp_path.iterdir())) if done.returncode else ""
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{found}"
    shown = done.stdout.partition("DRY: stand-ins on a CPU. No number is a measurement.")[2]
    for stage in stages.staged():
        (line,) = [line for line in shown.splitlines() if line.startswith(f"{stage.name}  ")]
        assert f" {OK} " in line and "[dry: " in line
    rows = [row for path in tmp_path.glob("*.jsonl") for row in read_rows(path)]
    assert rows and all(row["dry"] and not numbers(row) and "skipped" not in row for row in rows)
    assert {row["benchmark"] for row in rows if "benchmark" in row} == {"integer", "steps", "layers", "kernels"}
    assert len(list(tmp_path.iterdir())) <= MOST_FILES
    with pytest.raises(SystemExit, match="is of a dry run"):
        collect(tmp_path, None, tmp_path)


COLLECT = """
import json, sys
import pytest
for arguments in json.loads(sys.argv[1]):
    pytest.main([*arguments, "-n", "0", "--collect-only", "-q"])
    print("end of stage", flush=True)
"""


def test_every_stage_of_tests_has_tests_of_a_gpu() -> None:
    listed = [stage for stage in stages.staged() if stage.tests]
    arguments = [stage.command[stage.command.index("pytest") + 1 :] for stage in listed]
    command = [sys.executable, "-c", COLLECT, json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    shown = done.stdout.split("end of stage\n")[:-1]
    for stage, text in zip(listed, shown, strict=True):
        chosen = [line for line in text.splitlines() if "::" in line]
        files = {word for word in stage.command if word.startswith("tests/")}
        assert len(chosen) >= 10 and {line.partition("::")[0] for line in chosen} == files, (stage.name, text[-1000:])


def python(code: str, **settings: Any) -> Stage:
    name = settings.pop("name", "stage")
    return Stage(name, (sys.executable, "-c", code), settings.pop("limit", 20), f"{name}.log", **settings)


def ran(tmp_path: Path, *listed: Stage, budget: float = 60) -> list[Outcome]:
    return run(listed, tmp_path, budget, say=lambda _: None)


def test_a_red_stage_stops_nothing(tmp_path: Path) -> None:
    first = python("raise SystemExit(3)", name="first")
    second = python("print('on')", name="second", after=("first",))
    outcomes = ran(tmp_path, first, second)
    assert [outcome.result for outcome in outcomes] == [RED, OK]
    assert "exit code 3" in outcomes[0].counts and (tmp_path / "second.log").read_text() == "on\n"


def test_a_stage_ends_at_its_limit_with_all_that_it_started(tmp_path: Path) -> None:
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    began = time.monotonic()
    (outcome,) = ran(tmp_path, python(child, limit=1))
    assert outcome.result == TIMED_OUT and time.monotonic() - began < 20


def test_a_stage_without_time_or_program_is_shown(tmp_path: Path) -> None:
    outcomes = ran(tmp_path, python("1"), python("1", name="gone", absent="no program"), budget=3)
    assert [outcome.result for outcome in outcomes] == [NO_TIME, ABSENT]
    text = table(outcomes)
    assert "3 of 3 s were left" in text and "no program" in text


def test_stages_without_an_order_run_beside_each_other(tmp_path: Path) -> None:
    waits = (
        "import pathlib, time\npathlib.Path({0!r}).touch()\nwhile not pathlib.Path({1!r}).exists(): time.sleep(0.01)"
    )
    one, other = str(tmp_path / "one"), str(tmp_path / "other")
    outcomes = ran(tmp_path, python(waits.format(one, other), name="a"), python(waits.format(other, one), name="b"))
    assert [outcome.result for outcome in outcomes] == [OK, OK]


@pytest.mark.parametrize(("summary", "result", "counts"), [
    ("== 3 passed, 2 skipped in 1.0s ==", OK, "3 passed, 2 skipped"),
    ("== 1 failed, 3 passed in 1.0s ==", RED, "1 failed, 3 passed, exit code 0"),
    ("== 2 skipped in 1.0s ==", RED, "no test ran, exit code 0"),
    ("", RED, "no test ran, exit code 0"),
])  # fmt: skip
def test_what_tests_say_is_counted(summary: str, result: str, counts: str, tmp_path: Path) -> None:
    """A stage in which no test ran is red: everything was skipped, or nothing chosen."""
    (outcome,) = ran(tmp_path, python(f"print({summary!r})", tests=True))
    assert (outcome.result, outcome.counts) == (result, counts)


@pytest.mark.parametrize(("rows", "result", "counts"), [
    ([{"found": 1}], OK, "1 rows"),
    ([{"found": 1}, {"red": "x"}], RED, "1 rows, 1 red, exit code 0"),
    ([{"found": 1}, {"row": {"red": "x"}}], RED, "1 rows, 1 red, exit code 0"),
    ([{"found": 1}, {"skipped": "no time"}], OK, "1 rows, 1 without time"),
    ([], RED, "0 rows, exit code 0"),
])  # fmt: skip
def test_rows_are_counted(rows: list[dict[str, Any]], result: str, counts: str, tmp_path: Path) -> None:
    lines = "".join(json.dumps({"stage": "stage", **row}) + "\n" for row in [*rows, {"stage": "another"}])
    write = f"open({str(tmp_path / 'rows')!r}, 'w').write({lines!r})"
    (outcome,) = ran(tmp_path, python(write, rows="rows"))
    assert (outcome.result, outcome.counts) == (result, counts)


def notes(path: Path, seconds: float = 100, dry: bool = False) -> Notes:
    return Notes(path, "smoke", dry=dry, seconds=seconds)


def raising(error: BaseException) -> Callable[[], None]:
    def call() -> None:
        raise error

    return call


@pytest.mark.parametrize("error", [ValueError("wrong"), SystemExit("wrong")])
def test_a_section_that_raises_is_red_and_the_next_one_runs(error: BaseException, tmp_path: Path) -> None:
    mine = notes(tmp_path / "rows")
    mine.section("one", raising(error))
    mine.section("two", lambda: {"us": 1.5})
    one, two = read_rows(mine.path)
    assert one["red"] == f"{type(error).__name__}: wrong" and two["found"] == {"us": 1.5}
    with pytest.raises(SystemExit) as ended:
        mine.end()
    assert ended.value.code == 1


def test_a_section_past_the_time_is_noted(tmp_path: Path) -> None:
    mine = notes(tmp_path / "rows", seconds=0)
    mine.section("late", lambda: {"us": 1.5})
    assert [row["skipped"] for row in read_rows(mine.path)] == ["no time"]


def test_the_table_says_why_a_stage_is_red(tmp_path: Path) -> None:
    failing = "print('FAILED tests/test_x.py::test_y - wrong'); print('== 1 failed, 3 passed in 1.0s ==')"
    rows = f"open({str(tmp_path / 'rows')!r}, 'w').write({json.dumps({'stage': 'rows', 'red': 'because'})!r})"
    stages_ = python(failing, name="tests", tests=True), python(rows, name="rows", rows="rows")
    text = table(ran(tmp_path, *stages_, python("print(1/0)", name="other"), python("1", name="good")))
    why = text.partition("Why:\n")[2]
    assert "tests: FAILED tests/test_x.py::test_y - wrong" in why and '"red": "because"' in why
    assert "other: ZeroDivisionError" in why and "good:" not in why


def test_half_a_row_is_red(tmp_path: Path) -> None:
    (tmp_path / "rows").write_text('{"stage": "smoke", "found": 1}\n{"stage": "smo')
    assert "half a row" in read_rows(tmp_path / "rows")[1]["red"]


def test_a_dry_row_holds_no_number(tmp_path: Path) -> None:
    assert without_numbers({"us": 1.5, "batch": 4, "more": [0.5, {"x": 2.0}]}) == {
        "us": "dry", "batch": 4, "more": ["dry", {"x": "dry"}],
    }  # fmt: skip
    mine = notes(tmp_path / "rows", dry=True)
    mine.note(us=1.5)
    assert read_rows(mine.path) == [{"stage": "smoke", "dry": True, "us": "dry"}]


def test_rows_of_a_check_become_result_files(tmp_path: Path) -> None:
    mine = notes(tmp_path / "5-engine.jsonl")
    mine.note(machine={"gpu": "NVIDIA H100 80GB HBM3", "commit": UNKNOWN, "date": "2026-01-01"})
    mine.note(benchmark="layers", row={"layer": [1], "gops": 2.5})
    mine.note(kernels="W8A8", us=3.5)
    with pytest.raises(SystemExit, match="say it with --commit"):
        collect(tmp_path, None, tmp_path)
    (path,) = collect(tmp_path, "abc1234", tmp_path)
    data = json.loads(path.read_text())
    assert path.name == "layers-nvidia-h100-80gb-hbm3.json" and data["rows"] == [{"layer": [1], "gops": 2.5}]
    assert (data["machine"]["commit"], data["machine"]["date"]) == ("abc1234", "2026-01-01")


def test_without_a_gpu_it_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tools.gpu_check import __main__ as driver

    monkeypatch.setattr(driver, "a_gpu_is_there", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--out", str(tmp_path / "out")])
    monkeypatch.setenv("DRY", "0")
    with pytest.raises(SystemExit, match="a GPU must be there"):
        driver.main()
    assert not (tmp_path / "out").exists()


def test_the_full_check_names_what_exists() -> None:
    listed = stages.full()
    assert [stage.name for stage in listed] == ["build", "tests", "sanitizer", "kernels", "steps", "layers", "integer"]
    for stage in listed:
        modules = [word for word in stage.command if word.startswith("benchmarks.")]
        assert all((ROOT / f"{name.replace('.', '/')}.py").exists() for name in modules)
        assert stage.name in ("build", "kernels", "steps", "layers", "integer") or stage.environment == stages.TESTS
    for stage in stages.prepared(listed + stages.staged(), Path("out"), Path("cache")):
        assert stage.environment["TRITON_INTERPRET"] == "0" and "{out}" not in " ".join(stage.command)
        assert not stage.tests or stage.environment["NVIDIA_TF32_OVERRIDE"] == "0"
