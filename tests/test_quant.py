"""prepare(): what is quantized, what is shared, the exact forward, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dfq.config import LayerBits, QuantConfig, quant_config
from dfq.layers import QuantLayer, Tail
from dfq.layers.batch_norm import QuantBatchNorm
from dfq.layers.convolution import QuantConv
from dfq.models import ModelSpec, build_model
from dfq.quant import PrepareError, freeze_ranges, learn_ranges, prepare, prepared_of, range_parameters, set_adapting
from dfq.quant.exactness import layer_bounds
from dfq.quant.quantizers import ActivationQuantizer, least_squares_scale, weight_layers
from tests.conftest import small_net

NAMES = ["wrn-16-1", "resnet20", "resnet18", "vgg11", "mobilenet-v1", "mobilenet-v2"]


def calibrated(model: nn.Module, config: QuantConfig, x: torch.Tensor) -> nn.Module:
    student = prepare(copy.deepcopy(model), tuple(x.shape[1:]), config).train()
    set_adapting(student, True)
    with torch.no_grad():
        student(x)
    set_adapting(student, False)
    learn_ranges(student, config)
    return student


def with_statistics(name: str, stem: str = "cifar") -> nn.Module:
    model = build_model(ModelSpec(name, 3, 7, stem))
    with torch.no_grad():
        model.train()(torch.randn(4, 3, 32, 32))
    return model.eval()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("preset", ["W4A4", "gdfq"])
def test_all_models_prepare_train_and_evaluate(random: torch.Generator, name: str, preset: str) -> None:
    model = with_statistics(name, "imagenet" if preset == "gdfq" else "cifar")
    x = torch.randn(2, 3, 32, 32, generator=random)
    student = calibrated(model, quant_config(preset), x)
    student(x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in student.parameters())
    freeze_ranges(student)
    trained, exact = student.train()(x), student.eval()(x)
    # the same network, up to values that one of the two rounds to the next step
    assert float((trained - exact).std()) < 0.35 * float(exact.std() + 1e-3)


def test_eight_bits_are_close_to_float(random: torch.Generator) -> None:
    model, x = small_net(), torch.randn(64, 1, 12, 12, generator=random)
    student = calibrated(model, quant_config("W8A8"), x).eval()
    assert float((student(x) - model(x)).abs().max()) < 0.05 * float(model(x).std())


def test_parameters_keep_their_identity() -> None:
    model = small_net()
    before = {id(parameter) for parameter in model.parameters()}
    assert {id(parameter) for parameter in prepare(model, (1, 12, 12), quant_config("W4A4")).parameters()} == before


def test_what_is_quantized_with_how_many_bits() -> None:
    student = prepare(small_net(), (1, 12, 12), quant_config("W3A4", overrides={"conv3": LayerBits(2, 5)}))
    bits = {name: quantizer.bits for name, quantizer, _ in weight_layers(student)}
    assert bits == {"conv1": 8, "conv2": 3, "conv3": 2, "shortcut": 3, "fc": 8}
    activations = {
        name: module.bits for name, module in student.named_modules() if isinstance(module, ActivationQuantizer)
    }
    assert activations == {
        "quantizers.x_8": 8,  # the image
        "conv1.tail.quantizer": 4,  # read by conv2 and the shortcut alone: no stream
        "conv2.tail.quantizer": 5,  # conv3's input
        "shortcut.tail.quantizer": 8,  # the operand of the addition that is not an accumulator
        "calls.add.tail.quantizer": 8,  # the stream behind the addition, which is pooled
        "calls.pool_adaptive_avg_pool2d.tail.quantizer": 8,  # the head's input
    }
    signed = {
        name: module.quant_min < 0
        for name, module in student.named_modules()
        if isinstance(module, ActivationQuantizer)
    }
    assert signed["quantizers.x_8"] and signed["shortcut.tail.quantizer"] and not signed["conv1.tail.quantizer"]


def test_gdfq_convention() -> None:
    student = prepare(small_net(), (1, 12, 12), quant_config("gdfq-W3A3"))
    assert {quantizer.bits for _, quantizer, _ in weight_layers(student)} == {3}
    assert {quantizer.scheme for _, quantizer, _ in weight_layers(student)} == {"affine"}
    names = [name for name, module in student.named_modules() if isinstance(module, ActivationQuantizer)]
    assert names == ["conv1.tail.quantizer", "conv2.tail.quantizer", "calls.add.tail.quantizer"]  # every ReLU, once
    identities = prepare(
        build_model(ModelSpec("resnet20", 3, 7)), (3, 32, 32), quant_config("gdfq")
    )  # read by a layer and a sum
    bits = [module.bits for module in identities.modules() if isinstance(module, ActivationQuantizer)]
    assert bits == [4] * 19


def double_forward(student: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The small net's integer arithmetic written out by hand: float64 integer convolutions, fp32 constants."""
    modules = dict(student.named_modules())
    integers = {
        name: torch.round(
            quantizer(weight.detach())[0] / quantizer.scale.reshape(-1, *[1] * (weight.dim() - 1))
        ).double()
        for name, quantizer, weight in weight_layers(student)
    }
    weight_scales = {name: quantizer.scale for name, quantizer, _ in weight_layers(student)}

    def quantize(value: torch.Tensor, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        quantizer = modules[name]
        q = torch.round(value * (1 / quantizer.scale) + quantizer.zero_point).clamp(
            quantizer.quant_min, quantizer.quant_max
        )
        return q - quantizer.zero_point, quantizer.scale

    def layer(name: str, value: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        module, (q, scale) = modules[name], value
        if name == "fc":
            acc = F.linear(q.double(), integers[name])
        else:
            acc = F.conv2d(q.double(), integers[name], None, module.geometry["stride"], module.geometry["padding"])
        factor, shift = torch.ones_like(weight_scales[name]), torch.zeros_like(weight_scales[name])
        if module.bias is not None:
            shift = module.bias.detach()
        if (bn := module.tail.bn) is not None:
            factor = bn.weight.detach() * torch.rsqrt(bn.running_var + bn.eps)
            shift = (shift - bn.running_mean) * factor + bn.bias.detach()
        mult, view = scale * (weight_scales[name] * factor), [1, -1] + [1] * (acc.dim() - 2)
        bias = (shift / mult).round() * mult  # on the accumulators' grid
        return acc.float() * mult.view(view) + bias.view(view)

    out = quantize(layer("conv1", quantize(x, "quantizers.x_8")).relu(), "conv1.tail.quantizer")
    residual, residual_scale = quantize(layer("shortcut", out), "shortcut.tail.quantizer")
    middle = quantize(layer("conv2", out).relu(), "conv2.tail.quantizer")
    total = (layer("conv3", middle) + residual * residual_scale).relu()
    q, scale = quantize(total, "calls.add.tail.quantizer")
    pooled = q.long().sum((2, 3), keepdim=True).float() * (scale / (q.shape[2] * q.shape[3]))
    q, scale = quantize(pooled, "calls.pool_adaptive_avg_pool2d.tail.quantizer")
    return layer("fc", (q.flatten(1), scale))


@pytest.mark.parametrize("preset", ["W8A8", "W4A8", "W4A4", "W2A2"])
@pytest.mark.parametrize("ranges", ["minmax", "lsq"])
def test_exact_forward_is_integer_arithmetic(random: torch.Generator, preset: str, ranges: str) -> None:
    """`torch.equal` to the arithmetic of the integer network, written out in float64 integers."""
    config, x = quant_config(preset, ranges=ranges), torch.randn(16, 1, 12, 12, generator=random)
    student = calibrated(small_net(), config, x)
    freeze_ranges(student)
    assert torch.equal(student.eval()(x), double_forward(student, x))


@pytest.mark.parametrize(
    ("count", "used"), [(100, ["fp32"]), (4096, ["fp32", "fp32"]), (20000, ["float64"])]
)  # fmt: skip
def test_exact_forward_is_exact_where_fp32_is_not(count: int, used: list[str]) -> None:
    """Sums below 2^24 at once, larger ones of the weight's halves, the largest in float64."""
    module = QuantLayerProbe(torch.full((1, count), 127.0))
    x = torch.full((1, count), 255.0)
    x[0, 0] = 254.0
    exact = torch.tensor(float(127 * (255 * (count - 1) + 254)), dtype=torch.float64).float()
    assert float(module.accumulate_integers(x, module.weight)) == float(exact)
    assert module.used == [{"fp32": torch.float32, "float64": torch.float64}[name] for name in used]


def test_exact_forward_does_not_meet_winograd(random: torch.Generator) -> None:
    x = torch.randint(-255, 256, (32, 16, 32, 32), generator=random).float()
    weight = torch.randint(-127, 128, (16, 16, 3, 3), generator=random).float()
    geometry = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1, "after": (0, 0)}
    layer = QuantConv(nn.Parameter(weight), None, Tail(), geometry)
    with torch.backends.mkldnn.flags(enabled=False):  # as on machines without oneDNN
        found = layer.accumulate_integers(x, weight)
    assert torch.equal(found.double(), F.conv2d(x.double(), weight.double(), padding=1))


class QuantLayerProbe(QuantLayer):
    """Notes in which type the accumulators were computed."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__(nn.Parameter(weight), None, Tail())
        self.used: list[torch.dtype] = []

    def accumulate(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        self.used.append(x.dtype)
        return F.linear(x, weight, bias)


@pytest.mark.parametrize("shift", [-2.0, 2.0])
def test_bounds_hold_and_say_where_fp32_is_exact(random: torch.Generator, shift: float) -> None:
    x = torch.randn(16, 1, 12, 12, generator=random) + shift  # a zero point on one side or the other
    student = calibrated(small_net(), quant_config("W4A4"), x).eval()
    freeze_ranges(student)
    bounds = {item.layer: item for item in layer_bounds(student)}
    assert [(item.weight_bits, item.activation_bits) for item in bounds.values()] == [
        (8, 8), (4, 4), (4, 4), (4, 4), (8, 8)
    ]  # fmt: skip
    assert list(bounds) == ["conv1", "conv2", "conv3", "shortcut", "fc"]
    conv1, image = student.get_submodule("conv1"), student.get_submodule("quantizers.x_8")
    integers = torch.round(conv1.weight / weight_layers(student)[0][1].scale.view(-1, 1, 1, 1))
    # the input that reaches the bound: every pixel at the end of the range that is further from the zero point
    furthest = max(image.quant_max - image.zero_point, image.zero_point - image.quant_min)
    reached = [float(furthest * channel.abs().sum()) for channel in integers]
    assert bounds["conv1"].bound == max(reached) and bounds["conv1"].exact_in_fp32
    wide = calibrated(Wide(), quant_config("W8A8"), torch.randn(2, 1, 1, 1))
    assert [item.exact_in_fp32 for item in layer_bounds(wide)] == [True, False]


class Wide(nn.Module):
    """A head whose sums pass 2^24: 255 * 127 * 1024."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 1024, 1), nn.Linear(1024, 2)
        with torch.no_grad():
            self.fc.weight.fill_(1.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(F.relu(self.conv(x)).flatten(1))


def test_bounds_of_an_input_that_is_not_quantized() -> None:
    first = layer_bounds(prepare(small_net(), (1, 12, 12), quant_config("gdfq-W3A3")))[0]
    assert (first.activation_bits, first.bound, first.exact_in_fp32) == (None, None, False)


def test_exact_forward_does_not_depend_on_batch_size(random: torch.Generator) -> None:
    model = with_statistics("wrn-16-1")
    x = torch.randn(10, 3, 32, 32, generator=random)
    student = calibrated(model, quant_config("W4A4"), x).eval()
    freeze_ranges(student)
    assert torch.equal(student(x), torch.cat([student(part) for part in x.split(3)]))


def test_exact_forward_ignores_autocast(random: torch.Generator) -> None:
    student, x = (
        calibrated(small_net(), quant_config("W4A4"), torch.randn(4, 1, 12, 12)),
        torch.randn(4, 1, 12, 12, generator=random),
    )
    freeze_ranges(student)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = student.eval()(x)
    assert torch.equal(inside, student(x))


def test_ranges_move_only_while_adapting(random: torch.Generator) -> None:
    student = calibrated(small_net(), quant_config("W4A4"), torch.randn(8, 1, 12, 12, generator=random)).train()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    student(torch.randn(8, 1, 12, 12, generator=random) * 9)
    assert all(torch.equal(value, student.state_dict()[name]) for name, value in before.items())
    set_adapting(student, True)
    student(torch.randn(8, 1, 12, 12, generator=random) * 9)
    assert not torch.equal(before["quantizers.x_8.running_max"], student.state_dict()["quantizers.x_8.running_max"])


@pytest.mark.parametrize("batch_norm", ["frozen", "train"])
def test_batch_norms_train_only_if_asked(random: torch.Generator, batch_norm: str) -> None:
    config = QuantConfig(batch_norm=batch_norm)
    student = calibrated(small_net(), config, torch.randn(8, 1, 12, 12, generator=random))
    before = student.conv1.tail.bn.running_mean.clone()
    set_adapting(student, True)
    student.train()(torch.randn(8, 1, 12, 12, generator=random) + 3)
    assert torch.equal(before, student.conv1.tail.bn.running_mean) == (batch_norm == "frozen")


def test_learned_ranges_are_the_inner_ones_and_get_gradients(random: torch.Generator) -> None:
    x = torch.randn(8, 1, 12, 12, generator=random)
    student = calibrated(small_net(), quant_config("W3A3", ranges="lsq"), x)
    learned = range_parameters(student)
    assert len(learned) == 3 + 2  # weights of conv2, conv3, shortcut; inputs of (conv2 and shortcut), conv3
    student.train()(x).square().sum().backward()
    assert all(parameter.grad is not None and bool((parameter.grad != 0).any()) for parameter in learned)
    expected = student(x)
    freeze_ranges(student)
    assert not range_parameters(student) and torch.equal(student(x), expected)


def test_least_squares_scale_beats_the_range(random: torch.Generator) -> None:
    weight = torch.randn(16, 64, generator=random)
    wide = weight.abs().amax(1)
    best = least_squares_scale(weight, wide, -2, 1)

    def error(scale: torch.Tensor) -> torch.Tensor:
        q = (weight / scale[:, None]).round().clamp(-2, 1) * scale[:, None]
        return (q - weight).square().sum(1)

    assert bool((error(best) <= error(wide) + 1e-5).all()) and bool((best < wide).any())


class Odd(nn.Module):
    """A float model with one part that `part` chooses."""

    def __init__(self, part: str) -> None:
        super().__init__()
        self.part = part
        self.conv = nn.Conv2d(1, 4, 3, padding=1, padding_mode="reflect" if part == "padding" else "zeros")
        self.bn = nn.BatchNorm2d(4, track_running_stats=part != "statistics")
        self.act = nn.GELU() if part == "gelu" else nn.ReLU()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.bn(self.conv(x)))
        if self.part == "twice":
            x = self.bn(x)
        if self.part == "branch" and x.sum() > 0:
            x = x + x
        if self.part == "constant":
            x = x + 1
        if self.part == "sigmoid":
            x = torch.sigmoid(x)
        if self.part == "method":
            x = x.softmax(1)
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


@pytest.mark.parametrize("part", ["gelu", "sigmoid", "constant", "twice", "padding", "nothing"])
def test_odd_parts_are_the_same_function(random: torch.Generator, part: str) -> None:
    torch.manual_seed(0)
    model, x = Odd(part), torch.randn(32, 1, 12, 12, generator=random)
    with torch.no_grad():
        for _ in range(40):
            model.train()(x)
    student = calibrated(model.eval(), quant_config("W8A8"), x)
    freeze_ranges(student)
    expected = model(x)
    assert not prepared_of(student).floats
    assert float((student.eval()(x) - expected).abs().max()) < 0.06 * float(expected.abs().max())


@pytest.mark.parametrize(("part", "call"), [("method", "softmax"), ("statistics", "batch_norm")])
def test_what_has_no_integer_form_stays_in_floating_point(part: str, call: str) -> None:
    student = prepare(Odd(part), (1, 12, 12), quant_config("W4A4"))
    (found,) = prepared_of(student).floats
    assert call in found[1] and found[2]
    student(torch.randn(4, 1, 12, 12)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in student.parameters())


def test_a_branch_on_values_is_refused_by_name() -> None:
    with pytest.raises(PrepareError, match="captured by torch.export, got .* in the model: "):
        prepare(Odd("branch"), (1, 12, 12), quant_config("W4A4"))


def test_a_network_without_layers_is_refused() -> None:
    with pytest.raises(PrepareError, match="must have a convolution or a linear layer, got none"):
        prepare(nn.Sequential(nn.BatchNorm2d(1), nn.ReLU()), (1, 12, 12), quant_config("W4A4"))


def test_hooks_count(random: torch.Generator) -> None:
    model, x = small_net(), torch.randn(16, 1, 12, 12, generator=random)
    model.conv2.register_forward_hook(lambda module, inputs, out: out * 2)
    student = calibrated(model, quant_config("W8A8"), x)
    freeze_ranges(student)
    assert float((student.eval()(x) - model(x)).abs().max()) < 0.06 * float(model(x).abs().max())


def test_overrides_must_name_a_layer() -> None:
    with pytest.raises(PrepareError, match="overrides must name a layer .*conv1.*got 'conv9'"):
        prepare(small_net(), (1, 12, 12), quant_config("W4A4", overrides={"conv9": LayerBits(4, 4)}))


def test_preactivation_norms_stay_apart() -> None:
    student = prepare(build_model(ModelSpec("wrn-16-1")), (1, 32, 32), quant_config("W4A4"))
    norms = [module for module in student.modules() if isinstance(module, QuantBatchNorm)]
    assert len(norms) == 7  # one per block and one before the head; the other six are fused behind convolutions
