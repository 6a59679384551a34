"""What this machine is: `python -m tools.gpu_check.environment`. Every program that is not there is a line, too."""

from __future__ import annotations

import shutil
import subprocess
from importlib import metadata

PROGRAMS = (["nvidia-smi"], ["nvcc", "--version"], ["g++", "--version"], ["git", "describe", "--always"],
            ["nproc"], ["free", "-g"])  # fmt: skip
TOOLS = ("compute-sanitizer", "ncu", "cuobjdump", "ninja")
PACKAGES = ("torch", "triton", "numpy", "setuptools", "pybind11", "ninja", "pytest", "pytest-xdist", "hypothesis",
            "onnx", "onnxruntime", "typer")  # fmt: skip


def output(command: list[str]) -> str:
    """What a program prints, or that it is not there."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=20)
    except (FileNotFoundError, subprocess.TimeoutExpired) as error:
        return f"{' '.join(command)}: {type(error).__name__}"
    return f"{' '.join(command)}:\n{done.stdout.strip()}"


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"


if __name__ == "__main__":
    print("\n".join(map(output, PROGRAMS)))
    print("\n".join(f"{name}: {shutil.which(name) or 'absent'}" for name in TOOLS))
    print(", ".join(f"{name} {version(name)}" for name in PACKAGES))
