"""How a GPU computes in the tests: fp32 as fp32, the same bits at every call, Triton's kernels compiled."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS may sum in another order at every call

INTERPRETED = "tests on a GPU need TRITON_INTERPRET=0"


@pytest.fixture(autouse=True)
def exact_gpu(request: pytest.FixtureRequest) -> Iterator[None]:
    """References multiply fp32 in full (TF32 has 10 bits of mantissa), and gradients of cuDNN repeat their bits."""
    if request.node.get_closest_marker("gpu"):
        refuse_interpreter(os.environ.get("TRITON_INTERPRET"), request.config.option.markexpr)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield
    torch.backends.cuda.matmul.allow_tf32 = before


def refuse_interpreter(interpret: str | None, asked_for: str) -> None:
    """A test on a GPU whose Triton kernels run on the CPU says nothing about the GPU.

    Whoever asks for such tests (`-m gpu`) sees them fail. The whole suite interprets Triton and skips them: `make
    gpu-full` runs them.
    """
    if interpret != "1":
        return
    if "gpu" in asked_for:
        pytest.fail(f"{INTERPRETED}: else Triton's interpreter runs on the CPU", pytrace=False)
    pytest.skip(INTERPRETED)
