"""Machine instructions of a compiled kernel, and how many of them a turn of its longest loop has."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(.+?);")
BRANCH = re.compile(r"^(?:@!?U?P\w+ )?BRA(?:\.\w+)* .*?(0x[0-9a-f]+)")


def disassembled(cubin: bytes) -> list[tuple[int, str]]:
    """Addresses and instructions, without what pads the end."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([str(TOOLS / "cuobjdump"), "-sass", file.name], capture_output=True, text=True,
                              check=True, env={"PATH": f"{TOOLS}:/usr/bin:/bin"}).stdout  # fmt: skip
    found = [(int(at, 16), line.strip()) for at, line in LINE.findall(text)]
    return [(at, line) for at, line in found if line != "NOP"]


def loops(code: list[tuple[int, str]]) -> list[list[str]]:
    """The instructions of every loop: from where a branch goes back to, to the branch."""
    found = []
    for at, line in code:
        branch = BRANCH.match(line)
        if branch and int(branch[1], 16) < at:
            found.append([inside for place, inside in code if int(branch[1], 16) <= place <= at])
    return found


def counted(cubin: bytes) -> dict[str, int]:
    """`instructions` of the kernel, `step`: of its longest loop (0 where there is none)."""
    code = disassembled(cubin)
    return {"instructions": len(code), "step": max(map(len, loops(code)), default=0)}
