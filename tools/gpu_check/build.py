"""Builds the native module in place, for the GPU at hand alone: `python -m tools.gpu_check.build`.

By what `setup.py` has, without setuptools, which may want the network, and for one architecture in place of all.
`--dry` makes ninja's file and compiles nothing.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType
from unittest import mock

from tests.build_script import ROOT, build_script

FLAGS = "-std=c++17 -O3 -lineinfo -fmad=false -Xcompiler=-fPIC,-fvisibility=hidden -gencode=arch=compute_{},code=sm_{}"


def architecture() -> str | None:
    """Of the first GPU, as nvcc names it; None where the driver does not say."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True).stdout.split()
    except FileNotFoundError:
        return None
    return found[0].replace(".", "").replace("90", "90a") if found else None


def build(module: ModuleType, chosen: str | None, package: Path) -> int:
    """The exit code: 1 if there are no CUDA kernels, and why is printed and kept beside the module."""
    if chosen is not None:
        module.NVCC_FLAGS = FLAGS.format(chosen, chosen)
    target = (package / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}").resolve()
    levels, reason = module.compile_what_can_be(target, ROOT / "build" / "gpu-objects", "auto")
    note = package / "_native.txt"
    if reason is None:
        note.unlink(missing_ok=True)
    else:
        note.write_text(f"{reason}\n")
    print(f"architecture {chosen or 'unknown: all'}, levels {', '.join(levels)}, CUDA: {reason or 'built'}")
    return 0 if reason is None else 1


def dry(module: ModuleType) -> int:
    """The same with a compiler that is none: ninja's file has every CUDA source and the flag of Hopper."""
    made = []

    def compile_with_ninja(target: Path, folder: Path, nvcc: Path | None) -> list[str]:
        made.append(module.ninja_file("g++", "-I.", list(module.LEVELS), target, nvcc))
        return list(module.LEVELS)

    stand_ins = {"compile_with_ninja": compile_with_ninja, "find_nvcc": lambda: Path("nvcc"),
                 "cuda_library": lambda _: Path("lib64")}  # fmt: skip
    with mock.patch.multiple(module, **stand_ins), tempfile.TemporaryDirectory() as package:
        code = build(module, "90a", Path(package))
    (text,) = made
    absent = [source.name for source in module.CUDA if source.name not in text]
    print(f"dry: nothing was compiled; {len(module.CUDA)} CUDA sources, not in ninja's file: {absent}")
    return 1 if code or absent or "compute_90a" not in text or not module.CUDA else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--dry", action="store_true", help="make ninja's file and compile nothing")
    script = build_script()
    chosen = parser.parse_args()
    sys.exit(dry(script) if chosen.dry else build(script, architecture(), ROOT / "dfq_kernels"))
