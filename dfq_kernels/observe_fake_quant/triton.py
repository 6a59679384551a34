"""`observe_fake_quant` in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dfq_kernels.fake_quant import triton as fake_quant
from dfq_kernels.memory import Updated, dense
from dfq_kernels.observe_fake_quant import schema
from dfq_kernels.registration import register
from dfq_kernels.tiles import PROGRAMS, clamp, elements, launch, least, least_of, most, most_of, rne


@triton.jit
def extremes_kernel(x, parts, size, steps, BLOCK: tl.constexpr):
    # math     least and largest value of every program's part
    # traffic  x read
    # grid     at most PROGRAMS programs, each `steps` blocks
    # order    exact in any order
    start = tl.program_id(0).to(tl.int64) * steps * BLOCK
    low, high = tl.full((BLOCK,), float("inf"), tl.float32), tl.full((BLOCK,), float("-inf"), tl.float32)
    for step in range(steps):
        at = start + step * BLOCK + tl.arange(0, BLOCK)
        there = at < size
        values = tl.load(x + at, mask=there, other=0.0).to(tl.float32)
        low = tl.where(there, least(low, values), low)
        high = tl.where(there, most(high, values), high)
    tl.store(parts + tl.program_id(0), least_of(low))
    tl.store(parts + tl.num_programs(0) + tl.program_id(0), most_of(high))


@triton.jit
def move_range_kernel(
    parts, running_min, running_max, scale, zero_point, count, averaging_constant, quant_min, quant_max,
    SYMMETRIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # math     running += averaging_constant * (batch - running); scale and zero point follow
    # traffic  parts read
    # grid     one program
    low, high = tl.full((BLOCK,), float("inf"), tl.float32), tl.full((BLOCK,), float("-inf"), tl.float32)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        low = least(low, tl.load(parts + at, mask=at < count, other=float("inf")))
        high = most(high, tl.load(parts + count + at, mask=at < count, other=float("-inf")))
    batch_min, batch_max = least_of(low), most_of(high)
    finite = (tl.abs(batch_min) < float("inf")) & (tl.abs(batch_max) < float("inf"))
    # 2^126: the width of a range stays finite
    batch_min = clamp(batch_min, -8.507059173023462e37, 8.507059173023462e37)
    batch_max = clamp(batch_max, -8.507059173023462e37, 8.507059173023462e37)
    lowest, highest = tl.load(running_min), tl.load(running_max)
    first = lowest > highest
    moved_min = tl.where(first, batch_min, lowest + averaging_constant * (batch_min - lowest))
    moved_max = tl.where(first, batch_max, highest + averaging_constant * (batch_max - highest))
    lowest, highest = tl.where(finite, moved_min, lowest), tl.where(finite, moved_max, highest)
    tl.store(running_min, lowest)
    tl.store(running_max, highest)
    seen = lowest <= highest
    start, end = tl.where(seen & (lowest < 0), lowest, 0.0), tl.where(seen & (highest > 0), highest, 0.0)
    if SYMMETRIC:
        size = tl.div_rn(tl.maximum(-start, end), quant_max)
    else:
        size = tl.div_rn(end - start, quant_max - quant_min)
    size = tl.maximum(size, 1.0842021724855044e-19)  # 2^-63: of a range that is a single point
    tl.store(scale, size)
    if SYMMETRIC:
        tl.store(zero_point, 0.0)
    else:
        tl.store(zero_point, clamp(rne(quant_min - tl.div_rn(start, size)), quant_min, quant_max))


def move_range(
    parts: Tensor, values: list[Tensor], averaging_constant: float, quant_min: int, quant_max: int, symmetric: bool
) -> None:
    """`parts`: `[2, count]` least and largest values; `values`: running_min, running_max, scale, zero_point."""
    launch(
        move_range_kernel, "finish", 1, parts, parts, *values, parts.shape[1], averaging_constant, float(quant_min),
        float(quant_max), SYMMETRIC=symmetric, BLOCK=elements("finish"),
    )  # fmt: skip


@register(schema.FORWARD, "triton")
def forward(
    x: Tensor,
    running_min: Tensor,
    running_max: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    averaging_constant: float,
    quant_min: int,
    quant_max: int,
    symmetric: bool,
) -> tuple[Tensor, Tensor]:
    """Updates the range and its parameters in place; `(out, inside)` of `fake_quant` with the new ones."""
    x, block = dense(x), elements("reduction")
    updated = Updated((running_min, running_max, scale, zero_point))
    blocks = triton.cdiv(x.numel(), block)
    steps = triton.cdiv(blocks, PROGRAMS)
    programs = triton.cdiv(blocks, steps)
    parts = torch.empty(2, programs, dtype=torch.float32, device=x.device)
    launch(extremes_kernel, "reduction", programs, x, x, parts, x.numel(), steps, BLOCK=block)
    move_range(parts, updated.values, averaging_constant, quant_min, quant_max, symmetric)
    out, mask = fake_quant.forward(x, updated.values[2], updated.values[3], quant_min, quant_max, None)
    updated.done()
    return out, mask


backward = fake_quant.backward
