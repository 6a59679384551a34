"""prepare() on networks that are not ours: unusual parts give the same function, or are refused by name."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dfq.config import quant_config
from dfq.quant import PrepareError, freeze_ranges, prepare
from dfq.quant.pooling import QuantAveragePool
from tests.test_quant import calibrated


class Unusual(nn.Module):
    """What users' networks do that ours do not; `part` chooses."""

    def __init__(self, part: str) -> None:
        super().__init__()
        self.part = part
        self.conv = nn.Conv2d(1, 8, 3, padding=1, bias=True)
        self.bn = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=4, bias=True)
        self.bn2, self.bn3 = nn.BatchNorm2d(8), nn.BatchNorm1d(6)
        self.drop, self.relu = nn.Dropout(0.5), nn.ReLU(inplace=True)
        self.hidden, self.head = nn.Linear(8, 6), nn.Conv2d(8, 4, 1)
        self.other, self.bn4 = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.fc, self.tokens = nn.Linear(6, 4), nn.Linear(144, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.bn(self.conv(x)))
        y = self.bn2(self.grouped(x))
        if self.part == "two norms added":
            y = y + self.bn4(self.other(x))
        elif self.part == "in-place sum":
            y += x
        elif self.part == "sum of a value with its pool":
            y = torch.add(y, F.max_pool2d(x, 3, 1, 1))
        y = self.drop(self.relu(y))
        if self.part == "convolution last":
            return self.head(F.avg_pool2d(y, 4, 4)).mean([2, 3])
        if self.part == "tokens":
            return self.tokens(y.flatten(2)).flatten(1)
        if self.part == "view":
            y = F.adaptive_avg_pool2d(y, 1).view(x.size(0), -1)
        elif self.part == "reshape":
            y = F.adaptive_avg_pool2d(y, (1, 1)).reshape(y.shape[0], -1)
        elif self.part == "uneven pool":
            y = torch.flatten(F.adaptive_avg_pool2d(F.adaptive_avg_pool2d(y, 5), 1), 1)
        else:
            y = torch.mean(y, dim=(2, 3))
        return self.fc(F.relu(self.bn3(self.hidden(y))))


PARTS = [
    "two norms added",
    "in-place sum",
    "sum of a value with its pool",
    "convolution last",
    "tokens",
    "view",
    "reshape",
    "uneven pool",
    "mean",
]


@pytest.mark.parametrize("part", PARTS)
def test_unusual_networks_are_the_same_function_at_eight_bits(random: torch.Generator, part: str) -> None:
    torch.manual_seed(0)
    model, x = Unusual(part), torch.randn(64, 1, 12, 12, generator=random)
    with torch.no_grad():
        for _ in range(60):
            model.train()(x)
    student = calibrated(model.eval(), quant_config("W8A8"), x)
    freeze_ranges(student)
    expected = model(x)
    for found in (student.eval()(x), student.train()(x)):
        assert float((found - expected).abs().max()) < 0.06 * float(expected.abs().max())


def test_dropout_is_gone_from_the_student() -> None:
    student = prepare(Unusual("view"), quant_config("W4A4")).train()
    assert not any(isinstance(module, nn.Dropout) for module in student.modules())


@pytest.mark.parametrize(
    "call", [lambda net, x: net.relu(x), lambda net, x: F.relu(x, inplace=True), lambda net, x: x.relu_()]
)
def test_in_place_calls_whose_result_is_unused_are_refused(call) -> None:
    class InPlace(Unusual):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.bn(self.conv(x))
            call(self, x)
            return self.head(x)

    with pytest.raises(PrepareError, match="must be used .* got an in-place call"):
        prepare(InPlace("view"), quant_config("W4A4"))


@pytest.mark.parametrize(
    ("pool", "text"),
    [(nn.AvgPool2d(3, ceil_mode=True), "ceil_mode of 0 must be False"),
     (nn.AvgPool2d(2, divisor_override=3), "divisor_override of 0 must be None"),
     (nn.AvgPool2d(3, padding=1, count_include_pad=False), "count_include_pad of 0 must be True")],
)  # fmt: skip
def test_pools_whose_windows_differ_are_refused(pool: nn.Module, text: str) -> None:
    with pytest.raises(PrepareError, match=text):
        prepare(nn.Sequential(pool, nn.Conv2d(1, 4, 3)), quant_config("W4A4"))


def test_average_pools_sum_integers_exactly(random: torch.Generator) -> None:
    q = torch.randint(0, 256, (2, 3, 8, 8), generator=random).float()
    scale = torch.tensor(0.0123)
    for pool, count in ((QuantAveragePool(output_size=1), 64), (QuantAveragePool(kernel_size=2), 4)):
        found = pool.eval()(q * scale, scale)
        window = q.double().unfold(2, 8 if count == 64 else 2, 8 if count == 64 else 2)
        window = window.unfold(3, window.shape[-1], window.shape[-1])
        assert torch.equal(found, window.sum((-1, -2)).float() * (scale / count))
    uneven = QuantAveragePool(output_size=(3, 5)).eval()(q * scale, scale)
    torch.testing.assert_close(uneven, F.adaptive_avg_pool2d(q * scale, (3, 5)))
