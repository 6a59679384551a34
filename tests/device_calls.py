"""Which functions CUDA kernels call that nvcc would refuse, found without nvcc.

g++ compiles the .cu files against the headers of `cuda_emulator` and writes down who calls whom
(`-fcallgraph-info`). A kernel, and whatever runs on the device, may only call what is declared `__device__`; g++ itself
does not mind, because the emulator defines that word as nothing.
"""

from __future__ import annotations

import re
import subprocess
from functools import cache
from pathlib import Path

HERE = Path(__file__).parent
# functions of C and C++ that CUDA has for the device too, under the same names
DEVICE_TOO = re.compile(r"\bstd::isfinite\(|^void\* mem(cpy|set)\(|\n.*/mathcalls")
NODE = re.compile(r'^node: \{ title: "([^"]+)" label: "([^"]*)\\n([^"\\]+):(\d+):(\d+)(?:\\n[^"]*)?"', re.MULTILINE)
EDGE = re.compile(r'^edge: \{ sourcename: "([^"]+)" targetname: "([^"]+)" label: "([^"]*)"', re.MULTILINE)


def host_calls(source: Path, folder: Path) -> list[str]:
    """A line for every call of `source` from the device to a function of the host; `folder` gets the graph."""
    graph = folder / f"{source.stem}.ci"
    subprocess.run(
        ["g++", "-std=c++17", "-O0", "-Wno-psabi", f"-I{HERE / 'cuda_emulator'}", "-x", "c++", str(source), "-S",
         "-o", str(folder / f"{source.stem}.s"), "-fcallgraph-info"],
        check=True,
    )  # fmt: skip
    text = graph.read_text()
    functions = {title: (f"{name}\n{file}", _declared(Path(file), int(line), int(column)))
                 for title, name, file, line, column in NODE.findall(text)}  # fmt: skip
    kernels = any("__global__" in declared for _, declared in functions.values())
    assert kernels or "__global__" not in source.read_text(), f"{source.name}: its kernels must be in its call graph"

    def on_device(title: str) -> bool:
        name, declared = functions.get(title, ("", ""))
        return "__device__" in declared or "__global__" in declared or bool(DEVICE_TOO.search(name))

    found = []
    for caller, callee, where in EDGE.findall(text):
        if not on_device(caller) or on_device(callee) or callee not in functions:
            continue
        name, declared = functions[callee]
        implicit = re.search(r"\b(struct|class|union)\s*(alignas\([^;{}]*\)\s*)?$", declared) or "<lambda" in name
        if not implicit:  # a constructor that nobody wrote, and a lambda, are of whoever calls them
            file, line, _ = where.split(":")
            found.append(f"{Path(file).name}:{line} calls {name.splitlines()[0]}, which is no __device__")
    return list(dict.fromkeys(found))  # every instance of a template has the call


def _declared(file: Path, line: int, column: int) -> str:
    """What is written in front of a function's name, back to the end of what is before its declaration."""
    if not file.exists():
        return ""
    lines = _lines(file)
    before = "\n".join([*lines[: line - 1], lines[line - 1][: column - 1]])
    code = re.sub(r"//[^\n]*|^\s*#[^\n]*", "", before, flags=re.MULTILINE)
    return re.split(r"[;{}]|\bpublic:|\bprivate:", code)[-1]


@cache
def _lines(file: Path) -> list[str]:
    return file.read_text(errors="replace").splitlines()
