"""`int_conv2d` in Triton at tiles of 64 and 128 pixels, which Hopper multiplies by `wgmma`.

The conformance cases are small and end in tiles of 16 and 32 pixels (`mma.sync`). A GPU takes these tiles by itself at
real sizes; here they are forced, and interpreted.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import dfq_kernels as k
from dfq_kernels.dispatch import missing
from tests.conftest import SEED

# bits of activations and of weights, and whether the activations are signed
WIDTHS = ((8, 8, False), (8, 8, True), (8, 4, True), (4, 4, False), (4, 4, True), (4, 8, False), (2, 2, False))


def layer(
    bits: int, weight_bits: int, signed: bool, channels: int, side: int, batch: int, kernel: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Random integers over their whole range, packed, with a residual and a ReLU behind."""
    random = torch.Generator().manual_seed(SEED)
    low, limit = -(2 ** (bits - 1)) if signed else 0, 2 ** (weight_bits - 1)
    grid = k.Grid(0.5, low + 1, low, low + 2**bits - 1)
    q = torch.randint(low, low + 2**bits, (batch, channels, side, side), generator=random)
    x = k.quantize((q - grid.zero_point).float() * 0.5, grid, packed=True, backend="reference")
    values = torch.randint(-limit, limit, (channels, channels, kernel, kernel), generator=random, dtype=torch.int8)
    mult = torch.rand(channels, generator=random) / (channels * 2**bits)
    bias = torch.randn(channels, generator=random)
    settings = {"padding": kernel // 2, "packed": True, "activation": "relu", "residual": x}
    return (x, k.pack_weight(values, weight_bits), mult, bias, grid), settings


def on(device: str, arguments: tuple[Any, ...], settings: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    x, weight, mult, bias, grid = arguments
    moved = k.QuantizedTensor(x.q.to(device).contiguous(memory_format=torch.channels_last), x.grid, x.bits)
    values = moved, weight.to(device), mult.to(device), bias.to(device), grid
    return values, {**settings, "residual": moved}


def rows_of_tiles(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The pixels of every tile that a dense convolution is launched with, from here on."""
    from dfq_kernels.int_conv2d import triton as convolution

    seen: list[int] = []
    launch = convolution.launch

    def watched(kernel: Any, *values: Any, **constants: Any) -> Any:
        if kernel is convolution.dense_kernel:
            seen.append(constants["R"])
        return launch(kernel, *values, **constants)

    monkeypatch.setattr(convolution, "launch", watched)
    return seen


def outputs(arguments: tuple[Any, ...], settings: dict[str, Any], backend: str) -> Tensor:
    (found,) = k.int_conv2d(*arguments, **settings, backend=backend)
    return found.q.cpu()


@pytest.mark.skipif(missing("int_conv2d", "triton", "cpu") is not None, reason="Triton is not interpreted")
@pytest.mark.parametrize("rows", [64, 128])
@pytest.mark.parametrize(("bits", "weight_bits", "signed"), WIDTHS)
def test_large_tiles_interpreted(
    bits: int, weight_bits: int, signed: bool, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dfq_kernels import tiles
    from dfq_kernels.int_conv2d import triton as convolution

    monkeypatch.setattr(convolution, "MULTIPROCESSORS", 1)
    # four products of tiles of 2-bit fields fill the registers: they take half the pixels
    monkeypatch.setitem(tiles.tuning()["convolution"], "pixels", rows * (2 if bits == weight_bits == 2 else 1))
    seen = rows_of_tiles(monkeypatch)
    arguments, settings = layer(bits, weight_bits, signed, channels=16, side=9, batch=2, kernel=3)
    assert torch.equal(outputs(arguments, settings, "triton"), outputs(arguments, settings, "reference"))
    assert seen == [rows]


@pytest.mark.gpu
@pytest.mark.parametrize(("channels", "side", "batch", "kernel"), [(64, 16, 64, 3), (16, 32, 64, 3), (64, 8, 256, 1)])
@pytest.mark.parametrize(("bits", "weight_bits", "signed"), WIDTHS)
def test_tensor_cores(
    bits: int, weight_bits: int, signed: bool, channels: int, side: int, batch: int, kernel: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """At the sizes of networks, with the tiles that are chosen there."""
    seen = rows_of_tiles(monkeypatch)
    arguments, settings = layer(bits, weight_bits, signed, channels, side, batch, kernel)
    found = outputs(*on("cuda", arguments, settings), "triton")
    assert torch.equal(found, outputs(arguments, settings, "reference"))
    assert min(seen) >= 64
