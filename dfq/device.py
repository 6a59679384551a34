"""Device and precision of a run: `auto` becomes what this machine is fast at."""

from __future__ import annotations

import torch

PRECISIONS = ("auto", "fp32", "bf16")


def resolve_device(name: str) -> torch.device:
    """`auto`: the GPU if there is one, else the CPU.

    Raises:
        ValueError: an unknown device, or one that this machine does not have.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}") from error
    if device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device must be one that this machine has, got {name!r} with {torch.cuda.device_count()} GPUs"
        )
    return device


def resolve_precision(name: str, device: torch.device) -> str:
    """`auto`: bf16 autocast on a GPU that has it, on a CPU with AMX, or AVX512-BF16 if it is not Intel's; else fp32.

    torch 2.9 does not say whose a CPU is: there every AVX512-BF16 counts.

    Raises:
        ValueError: an unknown precision.
    """
    if name not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {name!r}")
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if _processor_is_fast_at_bf16() else "fp32"


def _processor_is_fast_at_bf16() -> bool:
    if not hasattr(torch.cpu, "get_capabilities"):  # torch 2.9 has no public question
        return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())
    capabilities = torch.cpu.get_capabilities()
    intel = str(capabilities.get("cpu_name", "")).startswith("Intel")  # its vectors of bf16 are slower than of fp32
    return bool(capabilities.get("amx_bf16") or (capabilities.get("avx512_bf16") and not intel))


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context in which a training step's forward passes run."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")
