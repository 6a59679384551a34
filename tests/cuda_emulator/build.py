"""Builds `dfq_kernels._native` with emulated CUDA kernels: g++ compiles the .cu files against this folder's headers."""

from __future__ import annotations

import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "csrc"
FLAGS = [
    "-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math",
    "-fno-strict-aliasing", "-Wno-psabi",
]  # fmt: skip
ONE_LEVEL = """#include "cpu/kernels.h"
namespace dfq {
namespace baseline { extern const CpuKernels table; }
const CpuKernels& cpu_kernels() { return baseline::table; }
}
"""


def build(folder: Path) -> Path:
    """The module's file, in `folder`."""
    (folder / "one_level.cpp").write_text(ONE_LEVEL)
    python = f"-I{sysconfig.get_path('include')}"
    jobs = [[f"-I{HERE}", "-x", "c++", str(path)] for path in sorted((CSRC / "cuda").glob("*.cu"))]
    jobs += [[f"-I{HERE}", str(HERE / "emulator.cpp")], [f"-I{CSRC}", str(folder / "one_level.cpp")]]
    for name in ("bindings.cpp", "program_bindings.cpp"):
        jobs += [["-DDFQ_CUDA_EMULATED", python, f"-I{pybind11.get_include()}", str(CSRC / name)]]
    cpu = [path for path in sorted((CSRC / "cpu").glob("*.cpp")) if path.stem != "select"]
    jobs += [["-DDFQ_ISA=baseline", str(path)] for path in cpu]

    def compile_one(job: list[str]) -> str:
        out = str(folder / f"{jobs.index(job)}.o")
        subprocess.run(["g++", *FLAGS, *job[:-1], "-c", job[-1], "-o", out], check=True)
        return out

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, jobs))
    target = folder / "_native.so"
    subprocess.run(["g++", "-shared", *objects, "-o", str(target)], check=True)
    return target
