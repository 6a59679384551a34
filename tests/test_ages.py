"""Numbers that are older than what they measure are marked, with a history at hand or without."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from benchmarks import ages, readme
from benchmarks.ages import MEASURED, Age, NoHistory, age, kept, legend, mark, update

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
FRESH, STALE = Age((), ""), Age(("dfq/quant", "dfq_kernels"), "2026-01-02")


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


def commit(folder: Path, name: str) -> str:
    """A commit that changes one file."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{path.read_text() if path.exists() else ''}x")
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", name)
    return git(folder, "rev-parse", "--short", "HEAD")


@pytest.fixture
def history(tmp_path: Path) -> Path:
    git(tmp_path, "init", "-q")
    return tmp_path


def test_a_change_of_what_is_measured_makes_numbers_old(history: Path) -> None:
    paths = MEASURED["steps"]
    measured = commit(history, "dfq/quant/graph.py")
    (
        commit(history, "docs/LOG.md"),
        commit(history, "dfq_kernels/fake_quant/triton.py"),
        commit(history, "dfq/quantum.py"),
    )
    assert age(history, measured, paths) == FRESH == age(history, f"{measured}-dirty", paths)
    commit(history, "dfq/quant/graph.py"), commit(history, "dfq/method/trainer.py")
    found = age(history, measured, paths)
    assert set(found.paths) == {"dfq/quant", "dfq/method"} and re.fullmatch(r"\d{4}-\d\d-\d\d", found.date)


def test_without_a_history_what_was_kept_stays_and_it_is_said(history: Path, tmp_path: Path) -> None:
    path, measured = tmp_path / "ages.json", commit(history, "dfq/engine/run.py")
    commit(history, "dfq/engine/run.py")
    assert update({"integer": {measured}}, history, path) == []
    before = kept(path)
    assert before["integer"][measured].paths == ("dfq/engine",)
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "-q", "--depth", "1", f"file://{history}", str(clone))
    said = update({"integer": {measured, "1234567"}}, clone, path)
    assert kept(path) == before
    assert set(said) == {
        "readme: the age of integer 1234567 is unknown: git knows no commit 1234567",
        f"readme: the age of integer {measured} is as it was: git knows no commit {measured}",
    }


def test_without_git_it_is_said(history: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(history))
    with pytest.raises(NoHistory, match="there is no git"):
        age(history, "1234567", MEASURED["steps"])


def test_marks_and_their_legend() -> None:
    known = {"new": FRESH, "old": STALE}
    assert [mark(known, commits) for commits in ({"new"}, {"old"}, {"new", "old"}, {"gone"})] == ["", "†", "†", "‡"]
    assert legend(known, {"new"}) == ""
    assert (
        legend(known, {"new", "old"}) == "† measured before the last change of `dfq/quant`, `dfq_kernels` (2026-01-02)."
    )
    assert legend(known, {"gone"}) == "‡ of unknown age: no history of gone was at hand."


@pytest.mark.parametrize("old", [False, True])
def test_the_readme_marks_old_rows_and_only_these(old: bool) -> None:
    commits = readme.measured_commits()
    known = {table: dict.fromkeys(names, STALE if old else FRESH) for table, names in commits.items()}
    blocks = re.findall(r"<!-- \w+ -->\n(.*?)<!-- end -->", readme.build(README, known), re.DOTALL)
    assert len(blocks) == 11 and all(("†" in block) == old and "‡" not in block for block in blocks)
    assert all(re.search(r"commit \w{7}(-dirty)? \(\d{4}-\d\d-\d\d\)", block) for block in blocks)


def test_one_old_row_is_marked_alone() -> None:
    shared = {"table": "ablation", "preset": "W3A3", "date": "then"}
    measured = (("a", 90.0, "now"), ("a", 91.0, "now"), ("b", 80.0, "now"), ("b", 82.0, "old"))
    rows = [{**shared, "method": method, "accuracy": value, "commit": commit} for method, value, commit in measured]
    data = {"rows": rows, "teacher": 92.0, "machine": {"cpu": "cpu", "torch": "2"}}
    built = readme.ablation_table(data, {"now": FRESH, "old": STALE})
    assert "| a | 2 | 90.50 ± 0.71 | 1.50 |" in built and "| b † | 2 | 81.00 ± 1.41 | 11.00 |" in built


def test_the_age_of_every_measured_commit_was_asked() -> None:
    known = kept()
    absent = {table: names - known.get(table, {}).keys() for table, names in readme.measured_commits().items()}
    assert not any(absent.values()), f"run `make readme` where there is a history: {absent}"


def test_what_is_measured_exists() -> None:
    assert set(MEASURED) == set(readme.measured_commits())
    assert all((ROOT / path).exists() for paths in MEASURED.values() for path in paths)
    names = [path.removeprefix(":(exclude)") for path in ages.ELSEWHERE]
    assert all(list(ROOT.glob(name)) for name in names)
