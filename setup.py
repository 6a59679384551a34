"""The native build: `dfq_kernels._native` from csrc/, with pybind11 and ninja and without torch.

The CPU kernels are compiled once per instruction-set level; the module picks one when it is loaded. CUDA kernels are
built where nvcc is found (`$CUDA_HOME`, the path, /usr/local/cuda). Without a compiler the install succeeds, and
`python -m dfq_kernels` gives the reason why native kernels are absent. `DFQ_BUILD_NATIVE`: `auto` (the default), `0`
(do not build), `cpu` (no CUDA kernels), `1` (fail if the CPU kernels, or where nvcc is found CUDA's, cannot be built).
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CPU = sorted(path for path in (ROOT / "csrc" / "cpu").glob("*.cpp") if path.stem != "select")
# -ffp-contract=off: every operation rounds on its own; the other two let rounding and square roots be vectorised
FLAGS = "-std=c++17 -O3 -fPIC -fvisibility=hidden -ffp-contract=off -fno-math-errno -fno-trapping-math -Wno-psabi"
CUDA = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
# machine code for Ampere and Ada, for Hopper, and PTX that later ones translate; -fmad=false as -ffp-contract=off above
NVCC_FLAGS = (
    "-std=c++17 -O3 -fmad=false -Xcompiler=-fPIC,-fvisibility=hidden -gencode=arch=compute_80,code=[sm_80,compute_80] "
    "-gencode=arch=compute_90a,code=sm_90a"
)
LEVELS = {"baseline": "", "v2": "-march=x86-64-v2", "v3": "-march=x86-64-v3", "v4": "-march=x86-64-v4"}


COULD_NOT = "could not compile it"


class Unbuilt(Exception):
    """Why there is no native module."""


class NinjaBuild(build_ext):
    """Compiles with ninja, as many jobs as there are cores."""

    def build_extension(self, ext: Extension) -> None:
        wanted = os.environ.get("DFQ_BUILD_NATIVE", "auto")
        if wanted not in ("auto", "0", "cpu", "1"):
            raise SystemExit(f"dfq-kernels: DFQ_BUILD_NATIVE must be auto, 0, cpu or 1, got {wanted!r}")
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        reason_file = target.parent / "_native.txt"  # why there is no module, or why it has no CUDA kernels
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            if wanted == "0":
                raise Unbuilt("it was built with DFQ_BUILD_NATIVE=0")
            levels, without_cuda = compile_what_can_be(target, Path(self.build_temp).resolve(), wanted)
        except Unbuilt as error:
            if wanted == "1":
                raise SystemExit(f"dfq-kernels: DFQ_BUILD_NATIVE=1, but {error}") from error
            target.unlink(missing_ok=True)
            reason_file.write_text(f"{error}\n")
            print(f"dfq-kernels: no native kernels: {error}", file=sys.stderr)
            if wanted != "0":
                warn("native kernels", str(error))
            return
        if without_cuda is None:
            reason_file.unlink(missing_ok=True)
        else:
            reason_file.write_text(f"{without_cuda}\n")
        cuda = "CUDA kernels" if without_cuda is None else f"no CUDA kernels: {without_cuda}"
        print(f"dfq-kernels: native CPU kernels for {', '.join(levels)}; {cuda}", file=sys.stderr)
        if without_cuda is not None and COULD_NOT in without_cuda:
            warn("CUDA kernels", without_cuda)

    def copy_extensions_to_source(self) -> None:
        """Of an editable install: the module if there is one, and why it has not everything."""
        for ext in self.extensions:
            built = Path(self.build_lib, self.get_ext_filename(ext.name))
            source = Path(self.get_ext_fullpath(ext.name))
            for name in (built.name, "_native.txt"):
                (source.parent / name).unlink(missing_ok=True)
                if (built.parent / name).exists():
                    shutil.copy2(built.parent / name, source.parent / name)


def warn(what: str, reason: str) -> None:
    """Something that was wanted is not there: more than a line that scrolls by."""
    text = [f"WARNING: dfq-kernels is installed WITHOUT its {what}.", f"Reason: {reason}",
            "Every operator works all the same, in another backend, and slower.",
            "`python -m dfq_kernels` says so, too. After mending it, install again.",
            "DFQ_BUILD_NATIVE=1 makes this an error; DFQ_BUILD_NATIVE=cpu or 0 is a choice of it."]  # fmt: skip
    bar = "*" * 100
    print("\n".join([bar, *(f"*  {line}" for line in text), bar]), file=sys.stderr)


def compile_what_can_be(target: Path, folder: Path, wanted: str) -> tuple[list[str], str | None]:
    """Builds `target`: its instruction-set levels, and why it has no CUDA kernels, if it has none."""
    nvcc = find_nvcc() if wanted != "cpu" else None
    reason = "nvcc was not found" if wanted != "cpu" else "it was built with DFQ_BUILD_NATIVE=cpu"
    if nvcc is not None:
        try:
            return compile_with_ninja(target, folder, nvcc), None
        except Unbuilt as error:
            if wanted == "1":
                raise
            reason = str(error)
    return compile_with_ninja(target, folder, None), reason


def find_nvcc() -> Path | None:
    """The CUDA compiler, if there is one with its static runtime."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    candidates = [Path(home) / "bin" / "nvcc" for home in homes if home]
    candidates += [Path(found) for found in [shutil.which("nvcc")] if found] + [Path("/usr/local/cuda/bin/nvcc")]
    return next((path for path in candidates if path.exists() and cuda_library(path) is not None), None)


def cuda_library(nvcc: Path) -> Path | None:
    """The folder of libcudart_static.a."""
    home = nvcc.resolve().parent.parent
    folders = [home / "lib64", home / "lib", home / "targets" / f"{platform.machine()}-linux" / "lib"]
    folders.append(Path("/usr/local/cuda/lib64"))
    return next((folder for folder in folders if (folder / "libcudart_static.a").exists()), None)


def compile_with_ninja(target: Path, folder: Path, nvcc: Path | None) -> list[str]:
    """Builds `target` in `folder`; the instruction-set levels that it holds."""
    if sys.platform == "win32":
        raise Unbuilt("the kernels need GCC or clang")
    compiler = os.environ.get("CXX") or next((name for name in ("g++", "clang++", "c++") if shutil.which(name)), None)
    if compiler is None or shutil.which(shlex.split(compiler)[0]) is None:
        raise Unbuilt(f"no C++ compiler was found ({compiler or 'g++, clang++, c++'})")
    try:
        import ninja
        import pybind11
    except ImportError as error:
        raise Unbuilt(f"{error.name} is not installed") from error
    levels = list(LEVELS) if platform.machine() in ("x86_64", "AMD64") else ["baseline"]
    folder.mkdir(parents=True, exist_ok=True)
    include = shlex.join(f"-I{path}" for path in (pybind11.get_include(), sysconfig.get_path("include")))
    (folder / "build.ninja").write_text(ninja_file(compiler, include, levels, target, nvcc))
    done = subprocess.run(
        [str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode != 0:
        print(done.stdout, file=sys.stderr)
        raise Unbuilt(f"{nvcc or compiler} {COULD_NOT}: {reason_of(done.stdout)}")
    return levels


def reason_of(output: str) -> str:
    """What the first command that failed said: its first line about an error, else its last one."""
    _, _, failed = output.partition("FAILED: ")
    said = []
    for line in failed.splitlines()[2:]:  # behind the name of what failed and the command
        if re.match(r"\[\d+/\d+\]|FAILED: |ninja: ", line):
            break
        said.append(line.strip())
    said = [line for line in said if line] or ([] if failed else output.strip().splitlines()[-1:])
    return next(
        (line for line in said if re.search(r"\b(error|fatal)\b", line, re.IGNORECASE)),
        said[-1] if said else "it said nothing",
    )


def sources_digest() -> str:
    """What the module was built from, so that tests see one that is older than csrc."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "csrc").rglob("*")):
        if path.suffix in (".h", ".cuh", ".cpp", ".cu"):
            digest.update(f"{path.relative_to(ROOT).as_posix()}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def ninja_file(compiler: str, include: str, levels: list[str], target: Path, nvcc: Path | None) -> str:
    """One edge per source and level, one link."""
    link = "-shared" + (" -undefined dynamic_lookup" if sys.platform == "darwin" else "")
    runtime = f"{shlex.quote(f'-L{cuda_library(nvcc)}')} -lcudart_static -ldl -lrt -lpthread" if nvcc else ""
    cuda = f"{shlex.quote(str(nvcc))} -ccbin {shlex.quote(shlex.split(compiler)[0])} {NVCC_FLAGS}"
    include, runtime, cuda = (text.replace("$", "$$") for text in (include, runtime, cuda))
    lines = [
        f"flags = {FLAGS}",
        f"rule cxx\n  command = {compiler} $flags $more -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d\n  deps = gcc",
        f"rule nvcc\n  command = {cuda} -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d\n  deps = gcc",
        f"rule link\n  command = {compiler} {link} $in -o $out {runtime}",
    ]
    objects = []

    def add(source: Path, name: str, more: str) -> None:
        objects.append(f"{name}.o")
        lines.append(f"build {name}.o: cxx {escape(source)}\n  more = {more}")

    for source in sorted((ROOT / "csrc").glob("*.cpp")):
        add(
            source, source.stem, f"{include} -DDFQ_SOURCES={sources_digest()}" if source.stem == "bindings" else include
        )
    add(ROOT / "csrc" / "cpu" / "select.cpp", "select", "")
    for source in CUDA if nvcc else []:  # first: they take longest
        objects.append(f"{source.stem}_cuda.o")
        lines.append(f"build {source.stem}_cuda.o: nvcc {escape(source)}")
    if nvcc is None:
        add(ROOT / "csrc" / "cuda" / "absent.cpp", "absent", "")
    for level in levels:
        for source in CPU:
            add(source, f"{source.stem}_{level}", f"{LEVELS[level]} -DDFQ_ISA={level}".strip())
    lines.append(f"build {escape(target)}: link {' '.join(objects)}\ndefault {escape(target)}")
    return "\n".join(lines) + "\n"


def escape(path: Path) -> str:
    """A path as ninja reads it."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


setup(ext_modules=[Extension("dfq_kernels._native", sources=[])], cmdclass={"build_ext": NinjaBuild})
