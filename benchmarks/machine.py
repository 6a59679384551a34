"""The line without which a number is not a number: machine, versions, commit."""

from __future__ import annotations

import subprocess
from pathlib import Path

import torch

from dfq.run_folder import versions


def machine_line() -> dict[str, str]:
    """CPU and its instruction set, GPU, versions, commit."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        "unknown",
    )
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.9 has none
    isa = [
        name
        for name in ("avx2", "avx512_f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
        if capabilities.get(name)
    ]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=True
    ).stdout
    return {"cpu": f"{model} ({', '.join(isa)})", "gpu": gpu, **versions(), "commit": commit.strip()}
