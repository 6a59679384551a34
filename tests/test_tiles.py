"""Tiles of integer products at any shape, by whatever this machine multiplies with, against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dfq_kernels as k
from dfq_kernels.dispatch import missing
from tests.conftest import SEED

pytestmark = pytest.mark.skipif(missing("int_conv2d", "native", "cpu") is not None, reason="no native kernels")

# channels, kernel, more: runs of one step, of several, too short; one block of output channels, two, an odd count
LAYERS: dict[str, tuple[tuple[int, int], int, dict[str, int]]] = {
    "stem": ((3, 16), 3, {}),
    "16": ((16, 16), 3, {}),
    "32 to 48": ((32, 48), 3, {}),
    "64 to 33": ((64, 33), 3, {}),
    "20, no padding": ((20, 24), 3, {"padding": 0}),
    "68, prime steps": ((68, 20), 3, {}),
    "1x1 of 144": ((144, 32), 1, {"padding": 0}),
    "1x1 of 160": ((160, 16), 1, {"padding": 0}),
    "strided": ((16, 32), 3, {"stride": 2}),
    "strided 1x1": ((32, 64), 1, {"padding": 0, "stride": 2}),
    "dilated": ((32, 32), 3, {"dilation": 2, "padding": 2}),
    "groups": ((64, 96), 3, {"groups": 2}),
    "5x5": ((16, 17), 5, {"padding": 2}),
}  # fmt: skip
WIDTHS = (7, 8, 13, 16, 17, 28, 33, 65)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", LAYERS)
def test_a_convolution_of_any_shape(name: str, width: int) -> None:
    (given, made), kernel, keywords = LAYERS[name]
    keywords = {"padding": 1, **keywords}
    generator = torch.Generator().manual_seed(SEED)
    on = k.Grid(0.1, 7, 0, 255)
    q = torch.randint(0, 256, (2, given, 5, width * keywords.get("stride", 1)), generator=generator, dtype=torch.uint8)
    shape = made, given // keywords.get("groups", 1), kernel, kernel
    weight = k.pack_weight(torch.randint(-128, 128, shape, generator=generator).to(torch.int8))
    mult, bias = (
        torch.rand(made, generator=generator) / (given * kernel**2 * 80),
        torch.randn(made, generator=generator),
    )
    arguments: Any = (k.QuantizedTensor(q, on), weight, mult, bias)
    settings: Any = {"outs": (k.Grid(0.05, 100, 0, 255),), **keywords}
    (found,), (expected,) = (k.int_conv2d(*arguments, **settings, backend=name) for name in ("native", "reference"))
    assert torch.equal(found.q, expected.q) and len(expected.q.unique()) > 50
