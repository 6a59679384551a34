"""Activations, tables, products, pools and resizes of integers against independent arithmetic: numpy's and torch's."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import dfq_kernels as k
from dfq_kernels.activations import activation_of
from dfq_kernels.dispatch import missing
from tests.bilinear import places

F32 = np.float32


@pytest.fixture(autouse=True, params=["reference", "native"], scope="module")
def every_backend(request: pytest.FixtureRequest) -> None:
    """What `backend=None` takes."""
    if (reason := missing("quantize", request.param, "cpu")) is not None:
        pytest.skip(reason)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dfq_kernels.dispatch._FOR_ALL", request.param)
        yield


def gate(t: np.ndarray) -> np.ndarray:
    return np.clip(t + F32(3), F32(0), F32(6)) * (F32(1) / F32(6))


ACTIVATIONS = {
    None: lambda t: t,
    "relu": lambda t: np.maximum(t, F32(0)),
    "relu6": lambda t: np.clip(t, F32(0), F32(6)),
    "hardtanh(-1.7,0.3)": lambda t: np.clip(t, F32(-1.7), F32(0.3)),
    "hardtanh(-inf,2)": lambda t: np.minimum(t, F32(2)),
    "leaky_relu(0.1)": lambda t: np.where(t > 0, t, F32(0.1) * t),
    "leaky_relu(-3)": lambda t: np.where(t > 0, t, F32(-3) * t),
    "hardsigmoid": gate,
    "hardswish": lambda t: t * gate(t),
}
SIGNED, UNSIGNED = k.Grid(0.3, -5, -128, 127), k.Grid(0.7, 200, 0, 255)


def every_integer(grid: k.Grid, channels: int = 3) -> tuple[k.QuantizedTensor, np.ndarray]:
    """All of a grid, per channel, and what they stand for."""
    q = torch.arange(grid.quant_min, grid.quant_max + 1, dtype=torch.int64)
    x = q.to(torch.int8 if grid.signed else torch.uint8).view(-1, 1).expand(-1, channels).contiguous()
    return k.QuantizedTensor(x, grid), (x.numpy().astype(F32) - F32(grid.zero_point)) * F32(grid.scale)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_round_every_operation(activation: str | None) -> None:
    out = k.Grid(0.011, 3, -128, 127)
    for grid in (SIGNED, UNSIGNED):
        x, real = every_integer(grid)
        expected = ACTIVATIONS[activation](real)
        assert expected.dtype == F32 and np.array_equal(k.requantize(x, activation=activation).numpy(), expected)
        (found,) = k.requantize(x, out, activation=activation)
        rounded = np.clip(np.rint(expected * F32(out.inverse) + F32(3)), -128, 127)
        assert np.array_equal(found.q.numpy(), rounded)


@pytest.mark.parametrize("text", ["gelu", "relu(1)", "hardtanh(1)", "hardtanh(2,1)", "leaky_relu(nan)", "relu 6", ""])
def test_unknown_activations_are_refused(text: str) -> None:
    x, _ = every_integer(SIGNED)
    with pytest.raises(ValueError, match="requantize: activation must be None, relu, relu6, hardtanh.a,b.*, got"):
        k.requantize(x, activation=text)
    with pytest.raises(ValueError, match="activation must be None, 'relu' or 'relu6', got 'hardswish'"):
        k.bn_act_stats(torch.ones(2, 1, 1, 1), None, None, torch.ones(1), torch.ones(1), activation="hardswish")


def test_an_activation_is_its_text() -> None:
    for text in ACTIVATIONS:
        if text is not None:
            again = activation_of(str(activation_of(text)))
            assert again == activation_of(text) and str(again) == str(activation_of(text))


def test_tables_are_looked_up(random: torch.Generator) -> None:
    for grid in (SIGNED, k.Grid(0.5, 1, 0, 15), k.Grid(0.5, 0, -2, 1), k.Grid(1.0, 3, 2, 200)):
        x, _ = every_integer(grid)
        table = torch.randn(grid.levels, generator=random)
        assert torch.equal(k.requantize(x, table=table), table[:, None].expand(-1, 3))
        out = k.Grid(0.02, 7, -128, 127)
        (found,) = k.requantize(x, out, table=table, activation="relu")
        assert np.array_equal(found.q[:, 0].numpy(), np.clip(
            np.rint(np.maximum(table.numpy(), 0) * F32(out.inverse) + F32(7)), -128, 127))  # fmt: skip
        first, second = k.requantize(x, grid, then=k.Requantize((out,), table=table))
        expected = np.clip(np.rint(table.numpy() * F32(out.inverse) + F32(7)), -128, 127)
        assert torch.equal(first.q, x.q) and np.array_equal(second.q[:, 0].numpy(), expected)
    beyond = k.QuantizedTensor(torch.tensor([[0, 9, 255]], dtype=torch.uint8), k.Grid(1.0, 2, 2, 5))
    assert k.requantize(beyond, table=torch.arange(4.0)).tolist() == [[0.0, 3.0, 3.0]]


def test_slopes_follow_the_batch_norm(random: torch.Generator) -> None:
    x, real = every_integer(SIGNED)
    mean, mult, bias, slope = torch.randn(4, 3, generator=random)
    t = (real - mean.numpy()) * mult.numpy() + bias.numpy()
    expected = np.where(t > 0, t, slope.numpy() * t)
    assert np.array_equal(k.requantize(x, mean=mean, mult=mult, bias=bias, slope=slope).numpy(), expected)
    assert np.array_equal(k.requantize(x, slope=slope).numpy(), np.where(real > 0, real, slope.numpy() * real))
    out = k.Grid(0.1, 1, -128, 127)
    _, found = k.requantize(x, SIGNED, then=k.Requantize((out,), slope=slope, activation="leaky_relu(0.5)"))
    t = np.where(real > 0, real, slope.numpy() * real)
    t = np.where(t > 0, t, F32(0.5) * t)
    assert np.array_equal(found.q.numpy(), np.clip(np.rint(t * F32(out.inverse) + F32(1)), -128, 127))


SHAPES = {"same": (2, 6, 4, 5), "vector": (2, 6), "pixel": (2, 6, 1, 1), "map": (2, 1, 4, 5)}


@pytest.mark.parametrize("kind", SHAPES)
def test_sums_and_products_of_any_shape(kind: str, random: torch.Generator) -> None:
    grids = k.Grid(0.3, 128, 0, 255), k.Grid(0.07, -3, -128, 127)
    x = k.QuantizedTensor(torch.randint(0, 256, (2, 6, 4, 5), generator=random).to(torch.uint8), grids[0])
    q = torch.randint(-128, 128, SHAPES[kind], generator=random).to(torch.int8)
    other = k.QuantizedTensor(q, grids[1])
    wide = q.view(2, 6, 1, 1) if kind == "vector" else q
    a, b = x.q.numpy().astype(np.int64) - 128, wide.numpy().astype(np.int64) + 3
    total = a.astype(F32) * F32(0.3) + b.astype(F32) * F32(0.07)
    assert np.array_equal(k.requantize(x, other=other).numpy(), total)
    scale = float(F32(0.3) * F32(0.07))
    product = (a * b).astype(F32) * F32(scale)
    assert np.array_equal(k.requantize(x, other=other, product_scale=scale).numpy(), product)
    out = k.Grid(1.5, 2, -128, 127)
    (found,) = k.requantize(x, out, other=other, product_scale=scale, activation="relu6")
    rounded = np.clip(np.rint(np.clip(product, F32(0), F32(6)) * F32(out.inverse) + F32(2)), -128, 127)
    assert np.array_equal(found.q.numpy(), rounded)


def test_a_vector_meets_a_pixel() -> None:
    vector = k.QuantizedTensor(torch.tensor([[1, 2]], dtype=torch.uint8), k.Grid(1.0, 0, 0, 255))
    pixel = k.QuantizedTensor(vector.q[:, :, None, None], vector.grid)
    assert k.requantize(vector, other=pixel).tolist() == [[2.0, 4.0]]
    assert k.requantize(pixel, other=vector).flatten().tolist() == [2.0, 4.0]


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_average_pools_are_torch_s(data: st.DataObject) -> None:
    """Sums by float64, which torch's own pool gives back with a divisor of 1; counts from its pool of ones."""
    draw, sides = data.draw, (data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9)))
    q = torch.randint(0, 256, (2, 3, *sides), generator=torch.Generator().manual_seed(draw(st.integers(0, 999))))
    x = k.QuantizedTensor(q.to(torch.uint8), k.Grid(0.3, 77, 0, 255))
    window = drawn_window(data, sides)
    padded = draw(st.booleans())
    divisor = draw(st.sampled_from([None, 1, 7]))
    whole, ones = q.double() - 77, torch.ones(1, 1, *sides, dtype=torch.float64)
    total = F.avg_pool2d(whole, *window, divisor_override=1)
    share = F.avg_pool2d(ones, *window, count_include_pad=padded, divisor_override=divisor)
    count = (F.avg_pool2d(ones, *window, divisor_override=1) / share).round().numpy().astype(F32)
    expected = total.numpy().astype(F32) * (F32(0.3) / count)
    kernel, stride, padding, ceil = window
    found = k.int_pool(x, kernel_size=kernel, stride=stride, padding=padding, ceil_mode=ceil,
                       count_include_pad=padded, divisor_override=divisor)  # fmt: skip
    assert np.array_equal(found.numpy(), expected)
    (largest,) = k.int_pool(x, mode="max", kernel_size=kernel, stride=stride, padding=padding, ceil_mode=ceil)
    assert torch.equal(largest.q.double(), F.max_pool2d(q.double(), kernel, stride, padding, 1, ceil))


def drawn_window(data: st.DataObject, sides: tuple[int, int]) -> tuple:
    """Kernel, stride, padding and ceil_mode that torch takes."""
    padding = [data.draw(st.integers(0, 2)) for _ in sides]
    kernel = [data.draw(st.integers(max(1, 2 * p), side + 2 * p)) if 2 * p <= side + 2 * p else 1
              for p, side in zip(padding, sides, strict=True)]  # fmt: skip
    return kernel, [data.draw(st.integers(1, 4)) for _ in sides], padding, data.draw(st.booleans())


@settings(max_examples=60, deadline=None)
@given(sides=st.tuples(*[st.integers(1, 9)] * 2), output=st.tuples(*[st.integers(1, 12)] * 2), seed=st.integers(0, 99))
def test_adaptive_pools_are_torch_s(sides: tuple[int, int], output: tuple[int, int], seed: int) -> None:
    """Also where they make more than there is."""
    q = torch.randint(-128, 128, (2, 3, *sides), generator=torch.Generator().manual_seed(seed))
    x = k.QuantizedTensor(q.to(torch.int8), k.Grid(0.3, 5, -128, 127))
    means = F.adaptive_avg_pool2d(q.double() - 5, output)
    for row in range(output[0]):  # the counts are those of the documented windows
        top, bottom = row * sides[0] // output[0], math.ceil((row + 1) * sides[0] / output[0])
        for column in range(output[1]):
            left, right = column * sides[1] // output[1], math.ceil((column + 1) * sides[1] / output[1])
            count = (bottom - top) * (right - left)
            means[:, :, row, column] = (means[:, :, row, column] * count).round() * float(F32(0.3) / F32(count))
    expected = means.float()
    found = k.int_pool(x, output_size=output)
    assert torch.equal(found, expected)
    (largest,) = k.int_pool(x, mode="max", output_size=output)
    assert torch.equal(largest.q.double(), F.adaptive_max_pool2d(q.double(), output))


@pytest.mark.parametrize("align", [False, True])
@pytest.mark.parametrize(("sides", "out"), [((3, 5), (6, 10)), ((7, 4), (3, 9)), ((1, 1), (4, 4)), ((5, 6), (1, 1))])
def test_resizes_are_torch_s(
    sides: tuple[int, int], out: tuple[int, int], align: bool, random: torch.Generator
) -> None:
    q = torch.randint(0, 256, (2, 3, *sides), generator=random).to(torch.uint8)
    x = k.QuantizedTensor(q, k.Grid(0.3, 77, 0, 255))
    (rows, down), (columns, across) = (places(side, size, align) for side, size in zip(sides, out, strict=True))
    given = {"rows": rows, "row_weights": down, "columns": columns, "column_weights": across}
    found = k.int_resize(x, **given)
    real = (q.double() - 77) * float(F32(0.3))
    expected = F.interpolate(real, out, mode="bilinear", align_corners=align)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)
    a, lx, ly = q.numpy().astype(F32) - F32(77), across.numpy(), down.numpy()[:, None]
    wide = a[..., columns[0].numpy()] * (F32(1) - lx) + a[..., columns[1].numpy()] * lx
    t = (wide[:, :, rows[0].numpy()] * (F32(1) - ly) + wide[:, :, rows[1].numpy()] * ly) * F32(0.3)
    assert np.array_equal(found.numpy(), t)
    for change, text in (
        ({"rows": rows + sides[0]}, "rows must be in"), ({"columns": columns.long()}, "columns must be int32"),
        ({"row_weights": down[:0]}, "row_weights must be of shape"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"int_resize: {text}"):
            k.int_resize(x, **given | change)


WRONG = {
    "slope must be of shape": {"slope": torch.ones(2)},
    "table must be of shape .256,., got": {"table": torch.ones(15)},
    "table must be without mean, mult, bias and slope": {"table": torch.ones(256), "slope": torch.ones(3)},
    "product_scale must be given with other": {"product_scale": 1.0},
    "product_scale must be in": {"product_scale": 0.0, "other": None},
    "other must be None beside a table": {"table": torch.ones(256), "other": None},
    "then: table must be of shape": {"outs": SIGNED, "then": k.Requantize((SIGNED,), table=torch.ones(3))},
}


@pytest.mark.parametrize("text", WRONG)
def test_what_excludes_one_another_is_refused(text: str) -> None:
    x, _ = every_integer(SIGNED)
    keywords = {name: x if name == "other" else value for name, value in WRONG[text].items()}
    with pytest.raises(ValueError, match=f"requantize: {text}"):
        k.requantize(x, keywords.pop("outs", ()), **keywords)
