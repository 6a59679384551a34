"""Integer products on AMX without AMX: what its tiles compute (emulated), and that the module has the instructions."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dfq_kernels import extension
from tests import one_level

ROOT = Path(__file__).parent.parent
EMULATOR = Path(__file__).parent / "amx_emulator"
INSTRUCTIONS = {"ldtilecfg", "tileloadd", "tdpbusd", "tilestored", "tilerelease"}

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None or not getattr(torch.cpu, "get_capabilities", dict)().get("avx512_vnni"),
    reason="the emulation needs g++ and a processor with VNNI, whose packing of weights AMX shares",
)


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    absent = [str(one_level.CSRC / "cuda" / "absent.cpp")]
    flags = ["-march=x86-64-v4", "-DDFQ_AMX_EMULATED", f"-I{EMULATOR}"]
    return one_level.build(tmp_path_factory.mktemp("amx"), "v4", cpu=flags, more=[absent])


@pytest.mark.parametrize(
    "arguments",
    [
        ["tests/test_tiles.py"],
        ["tests/test_engine.py", "-k", "layers_of_any_shape or (every_integer and W8A8)"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_emulated_tiles_give_the_same_integers(emulated: Path, arguments: list[str]) -> None:
    command = [sys.executable, "-m", "tests.with_module", str(emulated), "-v", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert int(re.findall(r"(\d+) passed", done.stdout)[-1]) > 5


@pytest.mark.skipif(shutil.which("objdump") is None, reason="no objdump to look with")
def test_the_module_has_the_instructions() -> None:
    module = extension.native().__file__ or ""
    text = subprocess.run(["objdump", "-d", "--no-show-raw-insn", module], capture_output=True, text=True).stdout
    found = {name for name in INSTRUCTIONS if re.search(rf"\t{name}\b", text)}
    assert found == INSTRUCTIONS
    # sums += pixels * weights; the assembler writes them from the last to the first
    products = set(re.findall(r"tdpbusd\s+%tmm(\d),%tmm(\d),%tmm(\d)", text))
    assert products == {("6", "4", "0"), ("7", "4", "1"), ("6", "5", "2"), ("7", "5", "3")}
