"""Skips that this machine does not justify make a run red."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import skips
from tests.build_script import build_script

ROOT = Path(__file__).parent.parent


def test_a_skip_that_is_not_on_the_list_fails_the_run() -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/unlisted_skip.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "1 skipped" in done.stdout
    assert "SKIPPED without a reason that holds here (tests/skips.py): Skipped: it is Thursday" in done.stdout


def test_a_reason_must_hold_here(monkeypatch: pytest.MonkeyPatch) -> None:
    without = "fake_quant native cuda: the native module was built without CUDA kernels: {}"
    failed, absent = without.format("nvcc could not compile it: error"), without.format("nvcc was not found")
    monkeypatch.setattr(build_script(), "find_nvcc", lambda: Path("nvcc"))
    monkeypatch.setattr(skips.extension, "missing", lambda device: failed)
    assert not skips.justified(failed) and not skips.justified(absent)
    monkeypatch.setattr(build_script(), "find_nvcc", lambda: None)
    assert skips.justified(absent)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not skips.justified("torch sees no CUDA device")
