"""Builds `dfq_kernels._native` with emulated CUDA kernels: g++ compiles the .cu files against this folder's headers."""

from __future__ import annotations

from pathlib import Path

from tests import one_level

HERE = Path(__file__).parent


def build(folder: Path) -> Path:
    """The module's file, in `folder`."""
    kernels = [[f"-I{HERE}", "-x", "c++", str(path)] for path in sorted((one_level.CSRC / "cuda").glob("*.cu"))]
    more = [*kernels, [f"-I{HERE}", str(HERE / "emulator.cpp")]]
    return one_level.build(folder, "baseline", bindings=["-DDFQ_CUDA_EMULATED"], more=more)
