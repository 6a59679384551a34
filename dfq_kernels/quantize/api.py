"""Public function of the operator: checks."""

from __future__ import annotations

import torch
from torch import Tensor

from dfq_kernels._checks import check_float
from dfq_kernels._integer_checks import check_epilogue, require
from dfq_kernels.dispatch import resolve
from dfq_kernels.integers import Grid, QuantizedTensor

OP = "quantize"


def quantize(
    x: Tensor, grid: Grid, *, activation: str | None = None, packed: bool = False, check_nan: bool = True,
    backend: str | None = None,
) -> QuantizedTensor:  # fmt: skip
    """Rounds real numbers to integers.

        q = clamp(rne(act(x) * (1 / scale) + zero_point), quant_min, quant_max)

    fp32 arithmetic, every operation rounded on its own; `rne` rounds half to even, `1 / scale` is rounded once.

    Args:
        x: `[N, C]` or `[N, C, H, W]`, float32, bfloat16 or float16, any strides.
        grid: scale, zero point and range.
        activation: None, or one of `dfq_kernels.activations`, with its numbers: `relu`, `hardtanh(-1,1)`.
        packed: whether integers of 4 or 2 bits share bytes, where the channels fill them.
        check_nan: whether to look for NaN, which waits for a GPU; without, NaN is taken for 0.
        backend: `native`, `triton` or `reference`; None takes the best that is there.

    Returns:
        The integers, channels-last.

    Raises:
        ValueError: a wrong dtype, shape or grid; NaN in x.
        BackendError: an explicit backend that is not there.

    Source: Jacob et al. 2018 (arXiv 1712.05877) section 2.1.
    """
    check_float(OP, "x", x)
    require(OP, x.dim() in (2, 4) and x.shape[1] > 0, "x", "[N, C] or [N, C, H, W]", tuple(x.shape))
    epilogue = check_epilogue(OP, activation, (grid,), None, packed, x.shape[1], x)
    if check_nan and not torch.compiler.is_compiling() and bool(x.isnan().any()):
        raise ValueError(f"{OP}: x must be numbers, got NaN")
    return QuantizedTensor(resolve(OP, backend, x).forward(x, *epilogue.flat())[0], grid, epilogue.bits[0])
