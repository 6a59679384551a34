"""The integer operators against independent arithmetic: by hand, in numpy, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import dfq_kernels as k
from dfq_kernels.dispatch import BACKENDS, missing

NAN, INF = float("nan"), float("inf")


@pytest.fixture(autouse=True, params=["reference", "native"])
def every_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `backend=None` takes."""
    if (reason := missing("quantize", request.param, "cpu")) is not None:
        pytest.skip(reason)
    monkeypatch.setattr("dfq_kernels.dispatch._FOR_ALL", request.param)


def test_quantize_ties_go_to_even_after_the_zero_point() -> None:
    x = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, -2.5]])
    assert k.quantize(x, k.Grid(1.0, 0, -8, 7)).q.tolist() == [[0, 2, 2, 0, -2, -2]]
    assert k.quantize(x, k.Grid(1.0, 1, -8, 7)).q.tolist() == [[2, 2, 4, 0, 0, -2]]
    assert k.quantize(x * 8, k.Grid(1.0, 0, 0, 15), activation="relu6").q.tolist() == [[4, 6, 6, 0, 0, 0]]


def test_quantize_multiplies_by_the_reciprocal() -> None:
    scale = float(np.float32(0.3))
    halves = (torch.arange(1, 120) + 0.5) * torch.tensor(0.3)
    expected = np.rint(halves.numpy() * (np.float32(1) / np.float32(scale))).astype(np.int64)
    found = k.quantize(halves[None], k.Grid(scale, 0, 0, 255), backend="reference").integers()[0].numpy()
    assert np.array_equal(found, expected)
    assert not np.array_equal(found, torch.round(halves / 0.3).long().numpy())


def test_quantize_refuses_what_is_no_number() -> None:
    x, grid = torch.tensor([[NAN, INF, -INF]]), k.Grid(1.0, 3, 0, 15)
    with pytest.raises(ValueError, match="quantize: x must be numbers, got NaN"):
        k.quantize(x, grid)
    for backend in BACKENDS:
        if missing("quantize", backend, "cpu") is None:
            assert k.quantize(x, grid, check_nan=False, backend=backend).q.tolist() == [[3, 15, 0]]


def test_packed_integers_lie_in_planes() -> None:
    """Byte j of a pixel: channels j, j + C / n, ..., the first in its lowest bits."""
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0], [15.0, 0.0, 7.0, 8.0]])
    packed = k.quantize(x, k.Grid(1.0, 0, 0, 15), packed=True)
    assert packed.bits == 4 and packed.shape == (2, 4) and packed.q.tolist() == [[0x31, 0x42], [0x7F, 0x80]]
    assert packed.integers().tolist() == x.long().tolist()
    signed = k.quantize(torch.tensor([[-2.0, -1.0, 0.0, 1.0]]), k.Grid(1.0, 0, -2, 1), packed=True)
    assert signed.bits == 2 and signed.q.tolist() == [[0b01001110]] and signed.integers().tolist() == [[-2, -1, 0, 1]]


def test_requantize_in_fractions() -> None:
    x = k.QuantizedTensor(torch.tensor([[5, 0]], dtype=torch.uint8), k.Grid(0.5, 1, 0, 15))
    other = k.QuantizedTensor(torch.tensor([[-4, 4]], dtype=torch.int8), k.Grid(0.25, 0, -8, 7))
    assert k.dequantize(x).tolist() == [[2.0, -0.5]]
    assert k.requantize(x, other=other).tolist() == [[1.0, 0.5]]
    mean, mult, bias = torch.tensor([1.0, 1.0]), torch.tensor([3.0, 2.0]), torch.tensor([0.5, 0.25])
    assert k.requantize(x, mean=mean, mult=mult, bias=bias, activation="relu").tolist() == [[3.5, 0.0]]
    bias = torch.tensor([0.5, 3.25])
    first, second = k.requantize(x, k.Grid(1.0, 0, 0, 3), then=k.Requantize((k.Grid(0.5, 2, 0, 7),), mean, mult, bias))
    # 2 and -0.5 are rounded to 2 and 0, and what follows reads those: (2 - 1) * 3 + 0.5 and (0 - 1) * 2 + 3.25
    assert first.q.tolist() == [[2, 0]] and second.q.tolist() == [[7, 4]]


def test_int_conv2d_is_the_convolution_of_what_the_integers_stand_for(random: torch.Generator) -> None:
    """Against float64, where no sum is rounded; the zero point is inserted by padding."""
    q = torch.randint(0, 256, (2, 6, 7, 5), generator=random).to(torch.uint8)
    weight = torch.randint(-128, 128, (4, 3, 3, 2), generator=random).to(torch.int8)
    bias = torch.randn(4, generator=random)
    x, geometry = k.QuantizedTensor(q, k.Grid(0.5, 77, 0, 255)), {"stride": (2, 1), "padding": (1, 2), "groups": 2}
    out = k.int_conv2d(x, k.pack_weight(weight), torch.full((4,), 0.125), bias, dilation=2, **geometry)
    real = (q.double() - 77) * 0.5
    acc = torch.nn.functional.conv2d(real, weight.double() * 0.25, None, dilation=2, **geometry)
    assert torch.equal(out, (acc.float() + bias.view(1, -1, 1, 1)))


def test_int_linear_adds_a_residual_and_rounds() -> None:
    x = k.QuantizedTensor(torch.tensor([[3, 5]], dtype=torch.uint8), k.Grid(1.0, 1, 0, 15))
    residual = k.QuantizedTensor(torch.tensor([[2, 0]], dtype=torch.int8), k.Grid(0.5, 1, -8, 7))
    weight = k.pack_weight(torch.tensor([[1, 2], [-1, 1]], dtype=torch.int8), 3)
    # sums 2 * 1 + 4 * 2 = 10 and -2 + 4 = 2; times 0.25, plus 1, plus 0.5 and -0.5: 4, 1
    (out,) = k.int_linear(x, weight, torch.full((2,), 0.25), torch.ones(2), k.Grid(1.0, 0, 0, 15), residual=residual)
    assert out.q.tolist() == [[4, 1]] and weight.bits == 4 and weight.sums.tolist() == [3, 0] and weight.largest == 3


def test_the_largest_sums_are_rounded_once(random: torch.Generator) -> None:
    """A sum beyond 2^24 becomes the nearest float, then is multiplied and added in fp32."""
    weight = torch.full((1, 3000), 127, dtype=torch.int8)
    q = torch.randint(0, 256, (64, 3000), generator=random).to(torch.uint8)
    mult, bias = torch.tensor([np.float32(0.1).item()]), torch.tensor([np.float32(0.3).item()])
    found = k.int_linear(k.QuantizedTensor(q, k.Grid(1.0, 0, 0, 255)), k.pack_weight(weight), mult, bias)
    acc = q.numpy().astype(np.int64).sum(1) * 127
    expected = acc.astype(np.float32) * np.float32(0.1) + np.float32(0.3)
    assert acc.max() > 2**24 and np.array_equal(found[:, 0].numpy(), expected)


def test_int_pool_in_integers() -> None:
    grid = k.Grid(0.5, 1, 0, 15)
    x = k.QuantizedTensor(torch.tensor([[[[1, 2, 3], [4, 5, 6], [7, 8, 10]]]], dtype=torch.uint8), grid)
    assert k.int_pool(x, output_size=1).item() == (46 - 9) * (np.float32(0.5) / np.float32(9))
    # windows of an adaptive pool overlap: rows 0 to 1 and 1 to 2
    assert k.int_pool(x, output_size=2).flatten().tolist() == [1.0, 1.5, 2.5, 3.125]
    # a padded place counts and adds nothing
    assert k.int_pool(x, kernel_size=2, stride=2, padding=1).flatten().tolist() == [0.0, 0.375, 1.125, 3.125]
    # scale / count is rounded first
    many = torch.arange(200, dtype=torch.uint8).view(1, -1, 1, 1).expand(1, 200, 3, 3)
    found = k.int_pool(k.QuantizedTensor(many, k.Grid(0.3, 0, 0, 255)), kernel_size=3).flatten().numpy()
    sums, scale, count = np.arange(200, dtype=np.float32) * 9, np.float32(0.3), np.float32(9)
    assert np.array_equal(found, sums * (scale / count)) and not np.array_equal(found, sums * scale / count)
    (largest,) = k.int_pool(x, mode="max", kernel_size=2, ceil_mode=True, stride=2)
    assert largest.grid == grid and largest.q.flatten().tolist() == [5, 6, 8, 10]
    (apart,) = k.int_pool(x, mode="max", kernel_size=2, dilation=2)
    assert apart.q.item() == 10


WRONG_INTEGERS = {
    "quantize: outs.0. must be a Grid": lambda x, w, v: k.quantize(torch.zeros(1, 2), 0.5),
    "quantize: outs.0.: zero_point must be in .0, 15., got 16": lambda x, w, v: k.quantize(
        torch.zeros(1, 2), k.Grid(1.0, 16, 0, 15)
    ),
    "quantize: outs.0. must be of at most 8 bits": lambda x, w, v: k.quantize(
        torch.zeros(1, 2), k.Grid(1.0, 0, 0, 256)
    ),
    "quantize: outs.0.: scale must be in": lambda x, w, v: k.quantize(torch.zeros(1, 2), k.Grid(0.0, 0, 0, 255)),
    r"quantize: x must be \[N, C\] or \[N, C, H, W\]": lambda x, w, v: k.quantize(torch.zeros(2), x.grid),
    "requantize: x must be a QuantizedTensor, got Tensor": lambda x, w, v: k.requantize(x.q),
    "requantize: x must be of dtype torch.uint8": lambda x, w, v: k.requantize(k.QuantizedTensor(v, x.grid)),
    "requantize: mean, mult, bias must be given together": lambda x, w, v: k.requantize(x, mean=v),
    "requantize: other must be of shape": lambda x, w, v: k.requantize(x, other=k.QuantizedTensor(x.q[:1], x.grid)),
    "requantize: outs must be at least one grid": lambda x, w, v: k.requantize(x, then=k.Requantize((x.grid,))),
    "int_conv2d: weight must be a PackedWeight": lambda x, w, v: k.int_conv2d(x, v, v, v),
    "int_conv2d: then must be a Requantize, got 'Grid'": lambda x, w, v: k.int_conv2d(x, w, v, v, x.grid, then=x.grid),
    "int_conv2d: outs must be a Grid or a list of them, got None": lambda x, w, v: k.int_conv2d(x, w, v, v, None),
    "int_conv2d: stride must be one or two integers in .1, 65536., got 1.5": lambda x, w, v: k.int_conv2d(
        x, w, v, v, stride=1.5
    ),
    "int_conv2d: weight: sums must be int32": lambda x, w, v: k.int_conv2d(
        x, k.PackedWeight(w.q, 8, w.sums[:1], 1), v, v
    ),
    r"int_linear: weight must be \[O, 5\]": lambda x, w, v: k.int_linear(
        k.QuantizedTensor(x.q[:, 0, 0], x.grid), w, v, v
    ),
    "requantize: x must be .* of at least one channel and pixel": lambda x, w, v: k.requantize(
        k.QuantizedTensor(x.q[:, :, :0], x.grid)
    ),
    "int_conv2d: groups must be a divisor": lambda x, w, v: k.int_conv2d(x, w, v, v, groups=2),
    "int_conv2d: weight must be within": lambda x, w, v: k.int_conv2d(x, w, v, v, dilation=9),
    "int_conv2d: stride must be one or two integers": lambda x, w, v: k.int_conv2d(x, w, v, v, stride=0),
    "int_conv2d: mult must be of shape": lambda x, w, v: k.int_conv2d(x, w, v[:1], v),
    "int_conv2d: residual must be of shape": lambda x, w, v: k.int_conv2d(x, w, v, v, residual=x),
    "int_conv2d: activation must be": lambda x, w, v: k.int_conv2d(x, w, v, v, activation="gelu"),
    "int_conv2d: the largest sum must be below": lambda x, w, v: k.int_conv2d(
        x, k.PackedWeight(w.q, 8, w.sums, 2**25), v, v
    ),
    "pack_weight: weight must be of 2 bits": lambda x, w, v: k.pack_weight(torch.full((1, 1), 5, dtype=torch.int8), 2),
    "pack_weight: weight must be int8": lambda x, w, v: k.pack_weight(v),
    "int_pool: mode must be average or max": lambda x, w, v: k.int_pool(x, mode="min", kernel_size=1),
    "int_pool: kernel_size must be given, or output_size": lambda x, w, v: k.int_pool(x),
    "int_pool: output_size must be one or two integers": lambda x, w, v: k.int_pool(x, output_size=0),
    "int_pool: divisor_override must be None or an integer": lambda x, w, v: k.int_pool(
        x, kernel_size=2, divisor_override=0
    ),
    "int_pool: count_include_pad and divisor_override must be those": lambda x, w, v: k.int_pool(
        x, output_size=2, count_include_pad=False
    ),
    "int_pool: padding must be at most half": lambda x, w, v: k.int_pool(x, kernel_size=2, padding=2),
    "int_pool: kernel_size must be within": lambda x, w, v: k.int_pool(x, mode="max", kernel_size=9),
    "int_pool: outs and activation must be those": lambda x, w, v: k.int_pool(x, x.grid, mode="max", kernel_size=2),
    "int_pool: dilation must be that of a maximum": lambda x, w, v: k.int_pool(x, kernel_size=2, dilation=2),
    "int_pool: stride, padding, dilation and ceil_mode must be none": lambda x, w, v: k.int_pool(
        x, output_size=2, stride=2
    ),
}


@pytest.mark.parametrize("text", WRONG_INTEGERS)
def test_wrong_integers_are_refused(text: str) -> None:
    x = k.QuantizedTensor(torch.zeros(2, 4, 5, 5, dtype=torch.uint8), k.Grid(0.5, 0, 0, 255))
    weight = k.pack_weight(torch.ones(3, 4, 3, 3, dtype=torch.int8))
    with pytest.raises(ValueError, match=text) as error:
        WRONG_INTEGERS[text](x, weight, torch.ones(3))
    assert "\n" not in str(error.value)


# --- what must change no byte -------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bits", [8, 4])
def test_permuted_padded_and_split_convolutions_are_the_same_bytes(
    backend: str, bits: int, random: torch.Generator
) -> None:
    """Channels in another order, channels of zero weights beside them, output channels in another order, one image."""
    if (reason := missing("int_conv2d", backend, "cpu")) is not None:
        pytest.skip(reason)
    grid, out_grid = k.Grid(0.5, 3, 0, 2**bits - 1), k.Grid(0.75, 1, -8, 7)
    q = torch.randint(0, 2**bits, (3, 8, 6, 5), generator=random).to(torch.uint8)
    weight = torch.randint(-7, 8, (12, 8, 3, 3), generator=random).to(torch.int8)
    mult, bias = torch.rand(12, generator=random) / 64, torch.randn(12, generator=random)

    def run(q: torch.Tensor, weight: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        x = k.quantize((q.float() - 3) * 0.5, grid, packed=True, backend="reference")
        packed = k.pack_weight(weight[order], bits)
        outs = k.int_conv2d(x, packed, mult[order], bias[order], out_grid, padding=1, packed=True, backend=backend)
        return outs[0].integers()

    same, inner, outer = torch.arange(12), torch.randperm(8, generator=random), torch.randperm(12, generator=random)
    whole = run(q, weight, same)
    assert torch.equal(run(q[:, inner], weight[:, inner], same), whole)
    assert torch.equal(run(q, weight, outer), whole[:, outer])
    assert torch.equal(torch.cat([run(image[None], weight, same) for image in q]), whole)
    more = torch.randint(0, 2**bits, (3, 8, 6, 5), generator=random).to(torch.uint8)
    assert torch.equal(run(torch.cat([q, more], 1), torch.cat([weight, 0 * weight], 1), same), whole)
