"""How a GPU computes in the tests: fp32 as fp32, the same bits at every call, Triton's kernels compiled."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS may sum in another order at every call


@pytest.fixture(autouse=True)
def exact_gpu(request: pytest.FixtureRequest) -> Iterator[None]:
    """References multiply fp32 in full (TF32 has 10 bits of mantissa), and gradients of cuDNN repeat their bits."""
    if request.node.get_closest_marker("gpu"):
        refuse_interpreter(os.environ.get("TRITON_INTERPRET"))
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield
    torch.backends.cuda.matmul.allow_tf32 = before


def refuse_interpreter(interpret: str | None) -> None:
    """A test on a GPU whose Triton kernels run on the CPU says nothing about the GPU."""
    if interpret == "1":
        pytest.fail("tests on a GPU need TRITON_INTERPRET=0: else Triton's interpreter runs on the CPU", pytrace=False)
