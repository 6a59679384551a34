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
from tests.build_script import build_script
from tests.device_calls import host_calls

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


def test_cuda_kernels_are_built_from_these_sources_where_nvcc_is(tmp_path: Path) -> None:
    """`auto` falls back where nvcc refuses the sources, and a module may be older than they are."""
    script = build_script()
    nvcc = script.find_nvcc()
    if nvcc is None:
        pytest.skip("nvcc was not found")
    reason = extension.missing("cuda")
    if reason is None:
        stale = "the native module is older than csrc: make native"
        assert extension.native().sources in (script.sources_digest(), "unknown"), stale
        return
    assert "DFQ_BUILD_NATIVE" in reason, f"nvcc is here, but {reason}"
    for source in script.CUDA:  # nobody compiled them yet
        command = [str(nvcc), "-std=c++17", "-O0", "-arch=sm_90a", "-c", str(source), "-o", str(tmp_path / "out.o")]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


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


def test_the_emulator_refuses_what_nvcc_would(tmp_path: Path) -> None:
    """Each of these compiles for g++; nvcc refuses all but the last."""
    (tmp_path / "kernels.cu").write_text("""#include <cuda_runtime.h>
#include <algorithm>
struct Pair { int a = 1, b = 2; int sum() const { return a + b; } __device__ int product() const { return a * b; } };
inline int host_only(int a) { return a + 1; }
template <class T> T host_template(T a) { return a; }
__device__ inline int on_device(int a) { return a + host_only(a); }
__global__ void direct(int* to) { *to = host_only(1); }
__global__ void indirect(int* to) { *to = on_device(1); }
__global__ void method(int* to) { *to = Pair().sum(); }
__global__ void library(int* to) { *to = std::max(*to, 1); }
__global__ void generic(float* to) { *to = host_template(1.0f); }
__global__ void right(int* to) { *to = Pair().product(); __syncthreads(); *to += static_cast<int>(rintf(1.5f)); }
""")
    lines = host_calls(tmp_path / "kernels.cu", tmp_path)
    assert sorted({int(line.split(":")[1].split()[0]) for line in lines}) == [6, 7, 9, 10, 11]
    assert "kernels.cu:7 calls int host_only(int), which is no __device__" in lines


@pytest.mark.long
@pytest.mark.parametrize("tests", os.environ.get("DFQ_EMULATED_TESTS", "equals_reference").split(","))
def test_emulated_kernels_pass_the_conformance_suite(emulated: Path, tests: str) -> None:
    command = [sys.executable, "-m", "tests.with_module", str(emulated), "-v", "tests/test_conformance.py",
               "-k", f"native and cpu and {tests}"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-3000:]
    assert int(re.findall(r"(\d+) passed", done.stdout)[-1]) > 10
