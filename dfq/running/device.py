"""Device and precision of a run: `auto` becomes what this machine is fast at."""

from __future__ import annotations

import torch

from dfq_kernels.processor import fast_at_bf16

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
        raise ValueError(f"dfq: device must be auto, cpu, cuda or cuda:N, got {name!r}") from error
    if device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index):
        raise ValueError(f"dfq: device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"dfq: device must be one that this machine has, got {name!r} with {torch.cuda.device_count()} GPUs"
        )
    return device


def resolve_precision(name: str, device: torch.device) -> str:
    """`auto`: bf16 autocast on a GPU that has it and on a CPU that is faster at it; else fp32.

    Raises:
        ValueError: an unknown precision.
    """
    if name not in PRECISIONS:
        raise ValueError(f"dfq: precision must be one of {', '.join(PRECISIONS)}, got {name!r}")
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if fast_at_bf16() else "fp32"


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context in which a training step's forward passes run."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")
