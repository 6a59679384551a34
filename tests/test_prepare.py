"""prepare() on networks that are not ours: unusual parts give the same function, or are refused by name."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dfq.config import LayerBits, quant_config
from dfq.layers import Tail
from dfq.layers.average_pool import QuantAveragePool
from dfq.quant import PrepareError, freeze_ranges, prepare
from tests.conftest import small_net
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


def same_at_eight_bits(model: nn.Module, x: torch.Tensor) -> None:
    """The student is the model but for rounding; the images stay as they are."""
    before = x.clone()
    expected = model(x.clone())
    student = calibrated(model, quant_config("W8A8"), x)
    freeze_ranges(student)
    assert float((student.eval()(x) - expected).detach().abs().max()) < 0.06 * float(expected.detach().abs().max())
    assert torch.equal(x, before)


def test_dropout_is_gone_from_the_student() -> None:
    student = prepare(Unusual("view"), (1, 12, 12), quant_config("W4A4")).train()
    assert not any(isinstance(module, nn.Dropout) for module in student.modules())


@pytest.mark.parametrize(
    "call", [lambda net, x: net.relu(x), lambda net, x: F.relu(x, inplace=True), lambda net, x: x.relu_()]
)
def test_in_place_calls_count_where_nobody_uses_their_result(random: torch.Generator, call) -> None:
    class InPlace(Unusual):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.bn(self.conv(x))
            call(self, x)
            return self.head(x)

    same_at_eight_bits(InPlace("view").eval(), torch.randn(16, 1, 12, 12, generator=random))


def test_average_pools_sum_integers_exactly(random: torch.Generator) -> None:
    q = torch.randint(0, 256, (2, 3, 8, 8), generator=random).float()
    scale = torch.tensor(0.0123)
    for pool, count in (
        (QuantAveragePool(Tail(), False, output=(1, 1)), 64),
        (QuantAveragePool(Tail(), False, kernel=(2, 2), stride=(2, 2)), 4),
    ):
        found = pool.eval()(q * scale, scale)
        window = q.double().unfold(2, 8 if count == 64 else 2, 8 if count == 64 else 2)
        window = window.unfold(3, window.shape[-1], window.shape[-1])
        assert torch.equal(found, window.sum((-1, -2)).float() * (scale / count))
    uneven = QuantAveragePool(Tail(), False, output=(3, 5)).eval()(q * scale, scale)
    torch.testing.assert_close(uneven, F.adaptive_avg_pool2d(q * scale, (3, 5)))


class Reads(Unusual):
    """`change` writes into x; x is read again afterwards."""

    def __init__(self, change) -> None:
        super().__init__("view")
        self.change = change

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn(self.conv(x))
        y = self.change(self, x)
        return self.head((x + self.other(y)).mean([2, 3], keepdim=True)).flatten(1)


def accumulate(net: Unusual, x: torch.Tensor) -> torch.Tensor:
    out = x
    out += net.grouped(x)
    return out


@pytest.mark.parametrize(
    "change",
    [accumulate, lambda net, x: net.relu(x), lambda net, x: F.relu(x, inplace=True), lambda net, x: x.relu_(),
     lambda net, x: x.add_(net.grouped(x)), lambda net, x: x.view(x.shape).relu_()],
)  # fmt: skip
def test_a_value_that_is_read_after_its_change_in_place_has_changed(random: torch.Generator, change) -> None:
    same_at_eight_bits(Reads(change).eval(), torch.randn(16, 1, 12, 12, generator=random))


def test_what_is_in_place_in_the_model_is_not_in_the_student() -> None:
    student = prepare(Unusual("in-place sum"), (1, 12, 12), quant_config("W4A4"))
    targets = [str(node.target) for node in student.graph.nodes if node.op == "call_function"]
    assert not any(target.split(".")[-2].endswith("_") for target in targets if target.startswith("aten."))
    assert not any(getattr(module, "inplace", False) for module in student.modules())


def test_what_no_output_depends_on_is_left_out() -> None:
    class Branch(Unusual):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.bn4(self.other(self.bn(self.conv(x)))).flatten(1)  # an auxiliary head that is not used
            return super().forward(x)

    student = prepare(Branch("view"), (1, 12, 12), quant_config("W4A4"))
    assert "other" not in dict(student.named_modules()) and "grouped" in dict(student.named_modules())


def test_names_of_the_new_graph_are_refused() -> None:
    for name in ("quantizers", "weight_quantizers", "calls", "graph", "meta", "_graph"):
        model = nn.Sequential()
        model.add_module(name, nn.Conv2d(1, 4, 3))
        rule = f"a submodule must not have a name .* got '{name}'"
        with pytest.raises(PrepareError, match=f"{rule}|captured by torch.export, got .*{name}"):
            prepare(model, (1, 12, 12), quant_config("W4A4"))


def test_a_weight_that_is_no_parameter_becomes_one() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3))
    weight = model[0].weight.detach()
    del model[0].weight
    model[0].weight = weight
    student = prepare(model, (1, 12, 12), quant_config("W4A4"))
    assert torch.equal(student.get_parameter("0.weight"), weight) and student.get_parameter("0.weight").requires_grad


def test_a_batch_norm_over_tokens_counts_tokens(random: torch.Generator) -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(1, 9, 4, 4), nn.BatchNorm2d(9)
            self.token, self.bn2, self.fc = nn.Linear(9, 9), nn.BatchNorm1d(9), nn.Linear(81, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.bn(self.conv(x)).flatten(2)
            return self.fc(self.bn2(self.token(x)).flatten(1))

    same_at_eight_bits(Tokens().eval(), torch.randn(16, 1, 12, 12, generator=random))


def test_modes_are_as_they_were() -> None:
    model = small_net().train()
    model.bn1.eval()
    prepare(model, (1, 12, 12), quant_config("W4A4"))
    assert model.training and model.conv1.training and not model.bn1.training
    for forward in (lambda net, x: x if x.sum() > 0 else -x, lambda net, x: net.conv(x[range(x)])):
        broken = type("Broken", (Unusual,), {"forward": forward})("view").train()
        with pytest.raises(PrepareError, match="captured by torch.export"):
            prepare(broken, (1, 12, 12), quant_config("W4A4"))
        assert broken.training


def test_a_forward_that_is_not_the_class_s_counts(random: torch.Generator) -> None:
    model = small_net()
    model.relu.forward = lambda x: x.clamp(min=-0.1)
    same_at_eight_bits(model, torch.randn(16, 1, 12, 12, generator=random))


@pytest.mark.parametrize(
    "read",
    [lambda net, x, f: torch.add(f, f.relu(), alpha=2), lambda net, x, f: F.avg_pool2d(f, f.size(2)),
     lambda net, x, f: f + net.relu(x), lambda net, x, f: F.dropout(f, 0.5, net.training)],
)  # fmt: skip
def test_unusual_calls_are_the_same_function(random: torch.Generator, read) -> None:
    class Reading(Unusual):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(read(self, x, self.bn(self.conv(x))))

    same_at_eight_bits(Reading("view").eval(), torch.randn(16, 1, 12, 12, generator=random))


def test_a_dropout_that_is_on_in_evaluation_is_refused() -> None:
    class Random(Unusual):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(F.dropout(self.bn(self.conv(x)), 0.5))

    with pytest.raises(PrepareError, match="must compute the same when torch.export captures it"):
        prepare(Random("view"), (1, 12, 12), quant_config("W4A4"))


@pytest.mark.parametrize("size", [lambda f: f.size(0), lambda f: f.shape[0]])
def test_a_changed_value_may_be_asked_for_its_shape(random: torch.Generator, size) -> None:
    class Shape(Unusual):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            f = self.bn(self.conv(x))
            out = F.relu(f, inplace=True)
            return self.head(out).mean([2, 3]).view(size(f), -1)

    model, x = Shape("view").eval(), torch.randn(8, 1, 12, 12, generator=random)
    student = calibrated(model, quant_config("W8A8"), x)
    freeze_ranges(student)
    assert float((student.eval()(x) - model(x)).detach().abs().max()) < 0.06 * float(model(x).detach().abs().max())


def test_a_model_in_training_is_traced_as_in_evaluation() -> None:
    class Mode(Unusual):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = F.dropout(self.bn(self.conv(x)), 0.5, self.training)
            return self.head(self.other(x) if self.training else x)

    assert "other" not in dict(prepare(Mode("view").train(), (1, 12, 12), quant_config("W4A4")).named_modules())


def test_gdfq_gives_a_relu_the_bits_that_its_layers_agree_on() -> None:
    config = quant_config("gdfq-W4A4", overrides={"conv3": LayerBits(4, 7)})
    modules = dict(prepare(small_net(), (1, 12, 12), config).named_modules())
    assert modules["conv2.tail.quantizer"].bits == 7 and modules["conv1.tail.quantizer"].bits == 4
