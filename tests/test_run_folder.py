"""A run's folder: what it refuses, what it says of a resume, what a failure leaves."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dfq.running.checkpoint import CheckpointError
from dfq.running.run_folder import RunFolder, read_config

SETTINGS = {"command": "test", "model": None, "quant": {"bits": {"weights": 4}, "ranges": "lsq"}, "seed": 0,
            "input_shape": [1, 2, 3], "num_classes": 4}  # fmt: skip


def test_the_setting_that_differs_is_named_alone(tmp_path: Path) -> None:
    RunFolder(tmp_path, SETTINGS, resume=False)
    other = {**SETTINGS, "quant": {"bits": {"weights": 3}, "ranges": "lsq"}}
    with pytest.raises(CheckpointError, match=rf"^run: quant\.bits\.weights must be 4 to resume {tmp_path}, got 3$"):
        RunFolder(tmp_path, other, resume=True)


@pytest.mark.parametrize("key", ["torch", "threads", "kernels"])
def test_a_resume_that_cannot_repeat_the_bits_says_so(
    tmp_path: Path, recwarn: pytest.WarningsRecorder, key: str
) -> None:
    RunFolder(tmp_path, SETTINGS, resume=False)
    RunFolder(tmp_path, SETTINGS, resume=True)
    assert not recwarn.list
    path = tmp_path / "config.json"
    saved = json.loads(path.read_text())
    saved["versions"][key] = "64"
    path.write_text(json.dumps(saved))
    with pytest.warns(UserWarning, match=f"{key} was 64 when .* began and is"):
        RunFolder(tmp_path, SETTINGS, resume=True)


def test_what_a_killed_start_left_does_not_block_the_folder(tmp_path: Path) -> None:
    (tmp_path / ".config.json.abc123").write_text("{")
    RunFolder(tmp_path, SETTINGS, resume=False)
    assert read_config(tmp_path) == SETTINGS


@pytest.mark.parametrize("key", ["command", "model", "quant", "input_shape", "num_classes", "seed"])
def test_a_config_without_what_every_run_has_is_refused(tmp_path: Path, key: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"config": {k: v for k, v in SETTINGS.items() if k != key}}))
    with pytest.raises(CheckpointError, match="must hold a run"):
        read_config(tmp_path)


def test_importing_dfq_leaves_matplotlib_alone() -> None:
    code = "import matplotlib; matplotlib.use('svg'); import dfq; print(matplotlib.get_backend())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "svg"


def test_importing_dfq_does_not_import_the_compiler() -> None:
    """It takes longer than everything else together."""
    code = "import dfq.cli.app, sys; print('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


def test_damaged_versions_and_metrics_do_not_stop_a_resume(tmp_path: Path) -> None:
    RunFolder(tmp_path, SETTINGS, resume=False)
    saved = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**saved, "versions": None}))
    with pytest.warns(UserWarning, match="was None when"), RunFolder(tmp_path, SETTINGS, resume=True) as folder:
        assert folder.metrics() == []
        (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 0, "loss": 1.0}\n{"step": \xff')
        folder.rewind(1)
        assert folder.metrics() == [{"step": 0, "loss": 1.0}]
