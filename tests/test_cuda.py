"""The CUDA kernels without a GPU: what they compute (emulated on the CPU), and what the compiler made of them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from dfq_kernels import extension

ROOT = Path(__file__).parent.parent
STREAMING = ("quantize", "masked", "rows", "columns")  # kernels that walk over a whole tensor


def tool(name: str) -> str | None:
    """A program of the CUDA toolkit; Triton brings some."""
    found = find_spec("triton")
    folders = (
        [Path(place) / "backends" / "nvidia" / "bin" for place in found.submodule_search_locations] if found else []
    )
    return next((str(path / name) for path in folders if (path / name).exists()), shutil.which(name))


def built() -> Path | None:
    return (
        Path(extension.native().__file__ or "")
        if extension.missing("cpu") is None and extension.native().cuda
        else None
    )


compiled = pytest.mark.skipif(
    built() is None or tool("cuobjdump") is None or tool("nvdisasm") is None,
    reason=f"no compiled CUDA kernels to look at: {extension.missing('cuda')}; cuobjdump: {tool('cuobjdump')}",
)


def inspect(*options: str) -> str:
    environment = {**os.environ, "PATH": f"{Path(str(tool('nvdisasm'))).parent}:{os.environ['PATH']}"}
    command = [str(tool("cuobjdump")), *options, str(built())]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout


@compiled
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_no_kernel_spills(arch: str) -> None:
    text = inspect("--dump-resource-usage", "-arch", arch)
    rows = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", text)
    assert len(rows) > 50
    for name, registers, stack, shared, local in rows:
        assert (int(stack), int(local)) == (0, 0), f"{name} keeps values in local memory"
        assert int(registers) <= 128 and int(shared) <= 48 * 1024, name


@compiled
def test_streaming_kernels_load_16_bytes() -> None:
    """Those for whole groups (the last template argument is true), in every type."""
    seen = set()
    for block in inspect("-sass", "-arch", "sm_90a").split("Function : ")[1:]:
        name = block.split(maxsplit=1)[0]
        found = re.search(rf"\d({'|'.join(STREAMING)})I.*Lb1EEE?v", name)
        if found:
            seen.add((found[1], *re.findall(r"bfloat16|half", name)[:1]))
            assert "LDG.E.128" in block, name
    assert seen == {(kernel, *kind) for kernel in STREAMING for kind in ((), ("bfloat16",), ("half",))}


@compiled
def test_minima_and_maxima_keep_nan() -> None:
    """In one instruction each; the emulator has another code for them."""
    found = re.findall(r"FMNMX[.\w]*", inspect("-sass", "-arch", "sm_90a"))
    assert len(found) > 1000 and set(found) == {"FMNMX.NAN"}


@compiled
def test_nothing_is_contracted_and_later_processors_have_ptx() -> None:
    text = inspect("-ptx")
    assert ".target sm_80" in text and text.count(".entry") > 50
    assert "mul.rn.f32" in text or "mul.f32" in text
    for entry in text.split(".entry ")[1:]:
        contracted = re.search(r"\bfma\.\w+\.f(32|64)", entry)
        # the logarithm of the loss is a polynomial of the library's
        assert contracted is None or "bn_stat_loss_cu" in entry.splitlines()[0], entry.splitlines()[0]


@pytest.mark.parametrize("tests", os.environ.get("DFQ_EMULATED_TESTS", "equals_reference").split(","))
def test_emulated_kernels_pass_the_conformance_suite(emulated: Path, tests: str) -> None:
    command = [sys.executable, "-m", "tests.with_module", str(emulated), "-v", "tests/test_conformance.py",
               "-k", f"native and cpu and {tests}"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-3000:]
    assert int(re.findall(r"(\d+) passed", done.stdout)[-1]) > 10
