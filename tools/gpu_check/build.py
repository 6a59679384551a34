"""Builds the native module in place, for the GPU at hand alone: `python -m tools.gpu_check.build`.

The CUDA kernels are compiled by what `setup.py` has, without setuptools' own reading of pyproject.toml, which may not
work offline, and for one architecture in place of all. `--dry` makes ninja's file and runs nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType
from unittest import mock

ROOT = Path(__file__).parent.parent.parent
FLAGS = "-std=c++17 -O3 -lineinfo -fmad=false -Xcompiler=-fPIC,-fvisibility=hidden -gencode=arch=compute_{},code=sm_{}"


def setup_module() -> ModuleType:
    """`setup.py` as a module that sets nothing up."""
    spec = importlib.util.spec_from_file_location("dfq_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with mock.patch("setuptools.setup"):
        spec.loader.exec_module(module)
    return module


def architecture() -> str | None:
    """Of the first GPU, as nvcc names it; None where the driver does not say."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True).stdout.split()
    except FileNotFoundError:
        return None
    return found[0].replace(".", "").replace("90", "90a") if found else None


def build(module: ModuleType, chosen: str | None) -> int:
    """The exit code: 1 if there are no CUDA kernels, and why is printed and kept beside the module."""
    if chosen is not None:
        module.NVCC_FLAGS = FLAGS.format(chosen, chosen)
    target = (ROOT / "dfq_kernels" / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}").resolve()
    levels, reason = module.compile_what_can_be(target, ROOT / "build" / "gpu-objects", cuda=True)
    note = target.parent / "_native.txt"
    if reason is None:
        note.unlink(missing_ok=True)
    else:
        note.write_text(f"{reason}\n")
    print(f"architecture {chosen or 'unknown: all'}, levels {', '.join(levels)}, CUDA: {reason or 'built'}")
    return 0 if reason is None else 1


def dry(module: ModuleType) -> int:
    """Ninja's file for Hopper: every CUDA source is in it, with this flag."""
    module.NVCC_FLAGS = FLAGS.format("90a", "90a")
    with mock.patch.object(module, "cuda_library", lambda _: Path("lib64")):
        text = module.ninja_file("g++", "-I.", list(module.LEVELS), Path("_native.so"), Path("nvcc"))
    absent = [source.name for source in module.CUDA if source.name not in text]
    print(f"dry: {len(module.CUDA)} CUDA sources, not in ninja's file: {absent}; {module.compile_what_can_be.__doc__}")
    return 1 if absent or "compute_90a" not in text or not module.CUDA else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--dry", action="store_true", help="make ninja's file and run nothing")
    found = setup_module()
    sys.exit(dry(found) if parser.parse_args().dry else build(found, architecture()))
