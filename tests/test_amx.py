"""Integer products on AMX without AMX: what its tiles compute (emulated), and that the module has the instructions."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dfq_kernels import extension
from tests.emulated import VNNI

ROOT = Path(__file__).parent.parent
INSTRUCTIONS = {"ldtilecfg", "tileloadd", "tdpbusd", "tilestored", "tilerelease"}


@pytest.mark.long
@pytest.mark.skipif(not VNNI, reason="AMX shares the packing of VNNI, which this processor does not have")
@pytest.mark.parametrize(
    "arguments",
    [
        ["tests/test_tiles.py"],
        ["tests/test_engine.py", "-k", "networks"],
        ["tests/test_engine_exported.py", "-k", "every_integer and W8A8"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_emulated_tiles_give_the_same_integers(emulated: Path, arguments: list[str]) -> None:
    command = [sys.executable, "-m", "tests.with_module", str(emulated), "-v", *arguments]
    environment = {**os.environ, "DFQ_BACKEND": "reference"}  # for training operators: emulated CUDA's take minutes
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert int(re.findall(r"(\d+) passed", done.stdout)[-1]) >= 5


@pytest.mark.skipif(
    platform.machine() != "x86_64" or extension.missing("cpu") is not None or shutil.which("objdump") is None,
    reason="no module for x86-64, or no objdump to look into it with",
)
def test_the_module_has_the_instructions() -> None:
    module = extension.native().__file__ or ""
    text = subprocess.run(["objdump", "-d", "--no-show-raw-insn", module], capture_output=True, text=True).stdout
    found = {name for name in INSTRUCTIONS if re.search(rf"\t{name}\b", text)}
    assert found == INSTRUCTIONS
    # sums += pixels * weights; the assembler writes them from the last to the first
    products = set(re.findall(r"tdpbusd\s+%tmm(\d),%tmm(\d),%tmm(\d)", text))
    assert products == {("6", "4", "0"), ("7", "4", "1"), ("6", "5", "2"), ("7", "5", "3")}
