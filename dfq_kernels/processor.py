"""What this processor is fast at."""

from __future__ import annotations

import torch


def fast_at_bf16() -> bool:
    """Whether it multiplies bf16 faster than fp32: with AMX, or with AVX512-BF16 if it is not Intel's, whose vectors of
    bf16 are slower than of fp32.

    torch 2.9 does not say whose a CPU is: there every AVX512-BF16 counts.
    """
    if not hasattr(torch.cpu, "get_capabilities"):  # torch 2.9 has no public question
        return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())
    capabilities = torch.cpu.get_capabilities()
    intel = str(capabilities.get("cpu_name", "")).startswith("Intel")
    return bool(capabilities.get("amx_bf16") or (capabilities.get("avx512_bf16") and not intel))
