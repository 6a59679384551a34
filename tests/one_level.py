"""Builds `dfq_kernels._native` for one instruction-set level, with what tests put in the place of hardware."""

from __future__ import annotations

import subprocess
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11

CSRC = Path(__file__).parent.parent / "csrc"
FLAGS = [
    "-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math",
    "-fno-strict-aliasing", "-Wno-psabi",
]  # fmt: skip
ONE_LEVEL = """#include "cpu/kernels.h"
namespace dfq {{
namespace {level} {{ extern const CpuKernels table; }}
const CpuKernels& cpu_kernels() {{ return {level}::table; }}
}}
"""


def build(
    folder: Path, level: str, *, cpu: Sequence[str] = (), bindings: Sequence[str] = (), more: Sequence[Sequence[str]]
) -> Path:
    """The module's file, in `folder`.

    Args:
        folder: an empty one.
        level: the name of the instruction-set level.
        cpu, bindings: flags for the CPU kernels and for the bindings.
        more: other sources, each with its flags before it.
    """
    (folder / "one_level.cpp").write_text(ONE_LEVEL.format(level=level))
    includes = [f"-I{sysconfig.get_path('include')}", f"-I{pybind11.get_include()}"]
    jobs = [list(job) for job in more] + [[f"-I{CSRC}", str(folder / "one_level.cpp")]]
    jobs += [[*bindings, *includes, str(path)] for path in sorted(CSRC.glob("*.cpp"))]
    kernels = [path for path in sorted((CSRC / "cpu").glob("*.cpp")) if path.stem != "select"]
    jobs += [[f"-DDFQ_ISA={level}", *cpu, str(path)] for path in kernels]

    def compile_one(job: list[str]) -> str:
        out = str(folder / f"{jobs.index(job)}.o")
        subprocess.run(["g++", *FLAGS, *job[:-1], "-c", job[-1], "-o", out], check=True)
        return out

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, jobs))
    target = folder / "_native.so"
    subprocess.run(["g++", "-shared", *objects, "-o", str(target)], check=True)
    return target
