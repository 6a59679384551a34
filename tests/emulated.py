"""Builds `dfq_kernels._native` with hardware that is not there: CUDA kernels and AMX tiles, emulated on the CPU.

g++ compiles the .cu files against the headers of `cuda_emulator`; AMX's instructions are functions of `amx_emulator`.
AMX shares VNNI's packing of weights, so its tiles are only there where the processor has VNNI.
"""

from __future__ import annotations

import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11
import torch

from tests.device_calls import host_calls

HERE = Path(__file__).parent
CSRC, CUDA, AMX = HERE.parent / "csrc", HERE / "cuda_emulator", HERE / "amx_emulator"
VNNI = bool(getattr(torch.cpu, "get_capabilities", dict)().get("avx512_vnni"))
LEVEL = "v4" if VNNI else "baseline"
CPU_FLAGS = ["-march=x86-64-v4", "-DDFQ_AMX_EMULATED", f"-I{AMX}"] if VNNI else []
FLAGS = [
    "-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math",
    "-fno-strict-aliasing", "-Wno-psabi",
]  # fmt: skip
ONE_LEVEL = f"""#include "cpu/kernels.h"
namespace dfq {{
namespace {LEVEL} {{ extern const CpuKernels table; }}
const CpuKernels& cpu_kernels() {{ return {LEVEL}::table; }}
}}
"""


def build(folder: Path) -> Path:
    """The module's file in `folder`, which nobody else writes to; built once.

    Raises:
        RuntimeError: a kernel calls a function of the host, which nvcc would refuse.
    """
    target = folder / "_native.so"
    if target.exists():
        return target
    sources = sorted((CSRC / "cuda").glob("*.cu"))
    if refused := [line for source in sources for line in host_calls(source, folder)]:
        raise RuntimeError("\n".join(["csrc/cuda: kernels must call __device__ functions only", *refused]))
    (folder / "one_level.cpp").write_text(ONE_LEVEL)
    jobs = [[f"-I{CUDA}", "-x", "c++", str(path)] for path in sources]
    jobs += [[f"-I{CUDA}", str(CUDA / "emulator.cpp")], [f"-I{CSRC}", str(folder / "one_level.cpp")]]
    includes = [f"-I{sysconfig.get_path('include')}", f"-I{pybind11.get_include()}"]
    jobs += [["-DDFQ_CUDA_EMULATED", *includes, str(path)] for path in sorted(CSRC.glob("*.cpp"))]
    kernels = [path for path in sorted((CSRC / "cpu").glob("*.cpp")) if path.stem != "select"]
    jobs += [[f"-DDFQ_ISA={LEVEL}", *CPU_FLAGS, str(path)] for path in kernels]

    def compile_one(job: list[str]) -> str:
        out = str(folder / f"{jobs.index(job)}.o")
        subprocess.run(["g++", *FLAGS, *job[:-1], "-c", job[-1], "-o", out], check=True)
        return out

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, jobs))
    subprocess.run(["g++", "-shared", *objects, "-o", str(folder / "linked.so")], check=True)
    return (folder / "linked.so").rename(target)
