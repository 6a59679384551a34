"""Quantizers: they own scale and zero point, and say where these come from (moving range, learned, fixed)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

import dfq_kernels
from dfq.config import QuantConfig
from dfq.layers.tail import activate
from dfq.running import ranks
from dfq_kernels.observe_fake_quant.reference import SCALE_FLOOR, divided, update_parameters, update_range

MOVING, LEARNED, FIXED = "moving", "learned", "fixed"
PHASES = (MOVING, LEARNED, FIXED)


class Quantizer(nn.Module):
    """What quantizers share: a grid, and a phase, which says where the scale comes from.

    Both are in `state_dict` (`grid`: quant_min, quant_max and the phase's number), so that a state puts a network that
    `prepare` has just made into its own phase, and is refused by one of other bits.
    """

    scale: Tensor
    zero_point: Tensor
    grid: Tensor

    def __init__(self, quant_min: int, quant_max: int, *shape: int) -> None:
        super().__init__()
        self.quant_min, self.quant_max, self.source = quant_min, quant_max, MOVING
        self.log_scale: nn.Parameter | None = None
        self.register_buffer("scale", torch.ones(shape))
        self.register_buffer("zero_point", torch.zeros(shape))
        self.register_buffer("grid", torch.tensor([quant_min, quant_max, 0]))

    def current_scale(self) -> Tensor:
        """`exp(log_scale)` where it is learned, with its gradient; else the buffer `scale`."""
        return self.scale if self.log_scale is None else self.log_scale.exp()

    def _enter(self, phase: str) -> None:
        """The scale is a parameter where it is learned, and a buffer elsewhere."""
        self.source = phase
        self.log_scale = nn.Parameter(self.scale.log()) if phase == LEARNED else None
        self.grid[2] = PHASES.index(phase)

    def fix(self) -> None:
        """`scale` becomes the current one, and neither batches nor an optimizer move it from then on."""
        self.scale.copy_(self.current_scale().detach())
        self._enter(FIXED)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        found = state_dict.get(f"{prefix}grid")
        if isinstance(found, Tensor) and found.shape == self.grid.shape:
            low, high, phase = (int(value) for value in found)
            if (low, high) != (self.quant_min, self.quant_max) or not 0 <= phase < len(PHASES):
                bounds = f"[{self.quant_min}, {self.quant_max}]"
                error_messages = rest[-1]
                error_messages.append(f"{prefix}grid must be of the integers {bounds}, got [{low}, {high}]")
                return
            self._enter(PHASES[phase])
        super()._load_from_state_dict(state_dict, prefix, *rest)


class ActivationQuantizer(Quantizer):
    """Per-tensor affine fake quantization; unsigned for values that are never negative.

    `source`: `moving` (the range follows the batches while `adapting`), `learned` (LSQ: the logarithm of the scale is a
    parameter) or `fixed`. `bypassed`: values pass as they are (`dfq.quant.modes`).
    """

    running_min: Tensor
    running_max: Tensor

    def __init__(self, bits: int, *, signed: bool, averaging_constant: float) -> None:
        quant_min = -(2 ** (bits - 1)) if signed else 0
        super().__init__(quant_min, quant_min + 2**bits - 1)
        self.bits, self.averaging_constant, self.adapting = bits, averaging_constant, False
        self.bypassed = False
        self.register_buffer("running_min", torch.full((), float("inf")))
        self.register_buffer("running_max", torch.full((), float("-inf")))

    @property
    def observing(self) -> bool:
        return self.adapting and self.source == MOVING and self.training

    @property
    def seen(self) -> bool:
        """Whether a finite batch has set the range."""
        return self.source != MOVING or bool(self.running_min <= self.running_max)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`(fake-quantized x, scale)`."""
        if self.bypassed:
            return x, self.scale
        low, high = self.quant_min, self.quant_max
        if self.observing and ranks.world() > 1:
            self._observe_all_ranks(x.detach())
        elif self.observing:
            out = dfq_kernels.observe_fake_quant(
                x, self.running_min, self.running_max, self.scale, self.zero_point,
                averaging_constant=self.averaging_constant, quant_min=low, quant_max=high,
            )  # fmt: skip
            return out, self.scale
        scale = self.current_scale()
        return dfq_kernels.fake_quant(x, scale, self.zero_point, low, high), scale

    @torch.no_grad()
    def _observe_all_ranks(self, x: Tensor) -> None:
        """The range moves towards that of all processes' batches together: the same in each of them.

        A batch with NaN or infinity in any process leaves all ranges as they are.
        """
        low, high = torch.aminmax(x.float())
        ends = torch.stack([-low, high])
        ends = torch.where(ends.isfinite().all(), ends, torch.full_like(ends, float("inf")))
        dist.all_reduce(ends, dist.ReduceOp.MAX)
        update_range(-ends[0], ends[1], self.running_min, self.running_max, self.averaging_constant)
        update_parameters(self.running_min, self.running_max, self.scale, self.zero_point, self.quant_min,
                          self.quant_max, False)  # fmt: skip

    def after_batch_norm(
        self, x: Tensor, norm: Any, mean: Tensor, var: Tensor, *, training: bool, momentum: float,
        activation: str | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """`(fake-quantized act(batch norm(x)), scale)` in one pass, where one process sees all images."""
        if self.bypassed or (self.observing and ranks.world() > 1):
            out = F.batch_norm(x, mean, var, norm.weight, norm.bias, training, momentum, norm.eps)
            return self(activate(out, activation))  # type: ignore[no-any-return]
        scale = self.current_scale()
        out = dfq_kernels.bn_act_fake_quant(
            x, norm.weight, norm.bias, mean, var, self.running_min, self.running_max, scale, self.zero_point,
            training=training, momentum=momentum, eps=norm.eps, activation=activation, observe=self.observing,
            averaging_constant=self.averaging_constant, quant_min=self.quant_min, quant_max=self.quant_max,
        )  # fmt: skip
        return out, scale

    @torch.no_grad()
    def set_range(self, low: Tensor, high: Tensor) -> None:
        """The range, whatever was seen; batches that are observed go on from it."""
        self.running_min.copy_(low)
        self.running_max.copy_(high)
        update_parameters(self.running_min, self.running_max, self.scale, self.zero_point, self.quant_min,
                          self.quant_max, False)  # fmt: skip

    def learn(self) -> None:
        self._enter(LEARNED)


class WeightQuantizer(Quantizer):
    """One layer's scales `[out_channels]`: from the weights themselves (`moving`), learned (LSQ), or fixed."""

    def __init__(self, bits: int, channels: int, scheme: str) -> None:
        super().__init__(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1, channels)
        self.bits, self.scheme = bits, scheme

    def forward(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """`(fake-quantized weight, scale)`."""
        if self.source == MOVING:
            self.measure(weight.detach())
        scale = self.current_scale()
        out = dfq_kernels.fake_quant(weight, scale, self.zero_point, self.quant_min, self.quant_max, axis=0)
        return out, scale

    def measure(self, weight: Tensor) -> None:
        """Scale and zero point from the weight's own range."""
        flat = weight.flatten(1).float()
        if self.scheme == "symmetric":
            self.scale.copy_(divided(flat.abs().amax(1), self.quant_max).clamp(min=SCALE_FLOOR))
            return
        low, high = flat.amin(1).clamp(max=0), flat.amax(1).clamp(min=0)
        self.scale.copy_(divided(high - low, self.quant_max - self.quant_min).clamp(min=SCALE_FLOOR))
        zero_point = (self.quant_min - low / self.scale).round()
        self.zero_point.copy_(zero_point.clamp(self.quant_min, self.quant_max))

    def use_bits(self, bits: int) -> None:
        """Other integers; the scale is the weights' own again."""
        self.bits, self.quant_min, self.quant_max = bits, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        self.grid[:2] = torch.tensor([self.quant_min, self.quant_max])
        self.follow()

    def learn(self, weight: Tensor) -> None:
        """Starts from the range; with 2 bits from the scale of least squared error (the range is too wide for it).

        A scale that is fixed (`fit_weights`) is where it starts.
        """
        if self.source != FIXED:
            self.measure(weight)
            if self.bits == 2 and self.scheme == "symmetric":
                self.scale.copy_(least_squares_scale(weight, self.scale, self.quant_min, self.quant_max))
        self._enter(LEARNED)

    def follow(self) -> None:
        """The scale is the weights' own range."""
        self._enter(MOVING)


def multiplied_type(device: str) -> torch.dtype | None:
    """What autocast would cast every weight to, on a device whose layers multiply the values themselves; None: nothing.

    A CPU's multiply the integers that values stand for, where that is faster.
    """
    if device == "cpu" or not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


class WeightQuantizers(nn.Module):
    """All layers' weights at once: those whose range is their own go through one call of one operator."""

    def __init__(self, quantizers: dict[str, WeightQuantizer]) -> None:
        """`quantizers`: by the name of the layer that owns the weight, in the order of the arguments of `forward`."""
        super().__init__()
        self.names = tuple(quantizers)
        self.layers = nn.ModuleList(quantizers.values())

    def forward(self, *weights: Tensor) -> list[tuple[Tensor, Tensor]]:
        """`(fake-quantized weight, scale)` of every layer."""
        together = [
            index
            for index, layer in enumerate(self.layers)
            if layer.source == MOVING and layer.scheme == "symmetric"  # type: ignore[union-attr]
        ]
        results: dict[int, tuple[Tensor, Tensor]] = {}
        if together:
            bits = [int(self.layers[index].bits) for index in together]  # type: ignore[arg-type]
            chosen = [weights[index] for index in together]
            dtype = multiplied_type(chosen[0].device.type) if self.training else None  # the exact forward wants fp32
            outs, scales = dfq_kernels.fake_quant_weights(chosen, bits, dtype=dtype)
            torch._foreach_copy_([self.layers[index].scale for index in together], scales)  # type: ignore[misc]
            results = dict(zip(together, zip(outs, scales, strict=True), strict=True))
        return [results.get(index) or layer(weights[index]) for index, layer in enumerate(self.layers)]


def least_squares_scale(weight: Tensor, scale: Tensor, quant_min: int, quant_max: int, steps: int = 60) -> Tensor:
    """Per output channel the fraction of `scale` at which fake quantization has the least squared error."""
    flat = weight.flatten(1)
    best, best_error = scale, torch.full_like(scale, float("inf"))
    for step in range(1, steps + 1):
        trial = scale * (step / steps)
        out = dfq_kernels.fake_quant(flat, trial, 0.0, quant_min, quant_max, axis=0)
        error = (out - flat).square().sum(1)
        best = torch.where(error < best_error, trial, best)
        best_error = torch.minimum(error, best_error)
    return best


def _quantizers(model: nn.Module) -> Iterator[ActivationQuantizer]:
    return (module for module in model.modules() if isinstance(module, ActivationQuantizer))


def set_adapting(
    model: nn.Module, adapting: bool, *, batch_norms: bool = True, pace: float | None = None
) -> None:  # fmt: skip
    """Whether training forwards move ranges and, where these train and `batch_norms`, batch norms.

    pace: the weight of a batch in moving ranges from now on; None: as it is.
    """
    for module in model.modules():
        if hasattr(module, "adapting"):
            is_range = isinstance(module, ActivationQuantizer)
            module.adapting = adapting and (is_range or batch_norms)  # type: ignore[assignment]
            if isinstance(module, ActivationQuantizer) and pace is not None:
                module.averaging_constant = pace


def unset_ranges(model: nn.Module) -> list[str]:
    """The quantizers that no finite batch has set: each would make a network of its default scale, without a word."""
    return [
        name for name, module in model.named_modules() if isinstance(module, ActivationQuantizer) and not module.seen
    ]


def _check_seen(owner: str, model: nn.Module) -> None:
    if unset := unset_ranges(model):
        rule = "have seen finite images in training mode while adapting (set_adapting)"
        raise ValueError(f"{owner}: model must {rule}, got no range of {unset[0]} ({len(unset)} without)")


def forget_ranges(model: nn.Module) -> None:
    """The next batches set every moving range as if they were the first."""
    for quantizer in _quantizers(model):
        quantizer.running_min.fill_(float("inf"))
        quantizer.running_max.fill_(float("-inf"))


def learn_ranges(model: nn.Module, config: QuantConfig) -> None:
    """Makes the step sizes of quantizers with fewer than 8 bits parameters, if `config.ranges` is `lsq`.

    They start where they are; those of weights from their range, or where `fit_weights` put them. If ranges are
    `minmax`, the scales of fitted weights follow the weights' range again.
    """
    if config.ranges != "lsq":
        for _, layer, _ in weight_layers(model):
            layer.follow()
        return
    _check_seen("learn_ranges", model)
    for quantizer in _quantizers(model):
        if quantizer.bits < 8:
            quantizer.learn()
    for _, layer, weight in weight_layers(model):
        if layer.bits < 8:
            layer.learn(weight.detach())


def freeze_ranges(model: nn.Module) -> None:
    """Fixes every scale where it is now: what is evaluated, saved and exported.

    Raises:
        ValueError: a range that no finite batch has set.
    """
    _check_seen("freeze_ranges", model)
    for quantizer in _quantizers(model):
        quantizer.fix()
    for _, layer, weight in weight_layers(model):
        if layer.source == MOVING:
            layer.measure(weight.detach())
        layer.fix()


@torch.no_grad()
def fit_weights(model: nn.Module) -> None:
    """Fixes the scales of symmetric weights of fewer than 8 bits where their squared error is least."""
    for _, layer, weight in weight_layers(model):
        if layer.bits < 8 and layer.scheme == "symmetric":
            layer.measure(weight)
            layer.scale.copy_(least_squares_scale(weight, layer.scale, layer.quant_min, layer.quant_max))
            layer.fix()


def range_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The learned step sizes."""
    return [parameter for name, parameter in model.named_parameters() if name.endswith("log_scale")]


def use_bits(model: nn.Module, bits: Mapping[str, int]) -> None:
    """Other bits of weights, by layer; before their scales are learned or fixed."""
    layers = {name: layer for name, layer, _ in weight_layers(model)} if bits else {}
    for name, wanted in bits.items():
        layers[name].use_bits(wanted)


def weight_layers(model: nn.Module) -> list[tuple[str, WeightQuantizer, Tensor]]:
    """Each layer's name, weight quantizer and weight, output channels first, in the order of the graph."""
    (together,) = [module for module in model.modules() if isinstance(module, WeightQuantizers)]
    weights = [model.get_submodule(name).oriented() for name in together.names]  # type: ignore[operator]
    return list(zip(together.names, together.layers, weights, strict=True))  # type: ignore[arg-type]
