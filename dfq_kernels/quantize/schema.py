"""What every backend of `quantize` has: arguments, results and their shapes."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dfq_kernels.integers import EPILOGUE, Epilogue, allocate
from dfq_kernels.registration import Schema


def _forward(x: Tensor, *epilogue: Any) -> list[Tensor]:
    return allocate(x, x.shape, Epilogue.of(*epilogue))


FORWARD = Schema("quantize", f"(Tensor x, {EPILOGUE}) -> Tensor[]", _forward)
