"""Whole training steps against torch.ao and forward hooks: `python -m benchmarks.end_to_end [--out FILE]`.

One generator step and one student step of recipe `paper` (WRN-16-1, W4A4, batch 128), the loop of `dfq.trainer` in both
variants. The baseline's operators are what people have: torch.ao's `FusedMovingAvgObsFakeQuantize` (which takes fp32
alone: values are converted around it, as its users must), `F.batch_norm`, and forward pre-hooks that take `var_mean`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.ao.quantization import (
    FusedMovingAvgObsFakeQuantize,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
)
from torch.nn import functional as F

from benchmarks.machine import results_file, write_results
from benchmarks.timing import interleaved
from dfq.bn_stats import BnStatistics
from dfq.cli import keep_freed_memory
from dfq.config import quant_config, recipe_named
from dfq.embedded import INPUT_SHAPE, load_teacher
from dfq.quant import prepare
from dfq.trainer import DataFreeTraining


class HookStatistics(BnStatistics):
    """The batch norms' input statistics by forward pre-hooks, and the loss layer by layer."""

    def __enter__(self) -> HookStatistics:
        self.seen: list[tuple[Any, Tensor, Tensor]] = []
        self.handles = [layer.register_forward_pre_hook(self._look) for layer in self.layers]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _look(self, layer: Any, inputs: tuple[Tensor, ...]) -> None:
        var, mean = torch.var_mean(inputs[0].float(), (0, 2, 3), unbiased=False)
        self.seen.append((layer, mean, var))

    def loss(self) -> Tensor:
        terms = []
        for layer, mean, var in self.seen:
            batch, stored = var.clamp(min=layer.eps), layer.running_var.clamp(min=layer.eps)
            ratio = (((mean - layer.running_mean) ** 2 + batch) / (2 * stored)) - 0.5 * torch.log(batch / stored) - 0.5
            terms.append(ratio.sum())
        return torch.stack(terms).sum() / sum(mean.numel() for _, mean, _ in self.seen)


class TorchAo:
    """The operators that a fake-quantized student calls, made of torch.ao's modules, one for each range."""

    def __init__(self) -> None:
        self.modules: dict[int, Any] = {}

    def fake_quant(
        self, x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, axis: int | None = None
    ) -> Tensor:
        """With a learned scale, what torch.ao's `_LearnableFakeQuantize` calls."""
        bounds = (quant_min, quant_max, 1.0)
        if axis is not None:
            return torch._fake_quantize_learnable_per_channel_affine(x, scale, zero_point, axis, *bounds)
        if scale.requires_grad:
            learned = scale.reshape(1), zero_point.reshape(1)
            return torch._fake_quantize_learnable_per_tensor_affine(x.float(), *learned, *bounds).to(x.dtype)
        whole = zero_point.to(torch.int32)
        return torch.fake_quantize_per_tensor_affine(x.float(), scale, whole, quant_min, quant_max).to(x.dtype)

    def observe_fake_quant(
        self, x: Tensor, running_min: Tensor, running_max: Tensor, *_: Tensor, quant_min: int, quant_max: int,
        averaging_constant: float,
    ) -> Tensor:  # fmt: skip
        """A new module starts from the range that calibration left."""
        if id(running_min) not in self.modules:
            dtype = torch.qint8 if quant_min < 0 else torch.quint8
            module = FusedMovingAvgObsFakeQuantize(
                MovingAverageMinMaxObserver, quant_min, quant_max, dtype=dtype, averaging_constant=averaging_constant
            )
            module.activation_post_process.min_val.copy_(running_min)
            module.activation_post_process.max_val.copy_(running_max)
            self.modules[id(running_min)] = module
        return self.modules[id(running_min)](x.float()).to(x.dtype)

    def bn_act_fake_quant(
        self, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, running_min: Tensor,
        running_max: Tensor, scale: Tensor, zero_point: Tensor, *, training: bool, momentum: float, eps: float,
        activation: str | None, observe: bool, averaging_constant: float, **bounds: int,
    ) -> Tensor:  # fmt: skip
        out = F.batch_norm(x, mean, var, weight, bias, training, momentum, eps)
        out = F.relu(out) if activation == "relu" else out
        if not observe:
            return self.fake_quant(out, scale, zero_point, **bounds)
        return self.observe_fake_quant(out, running_min, running_max, averaging_constant=averaging_constant, **bounds)

    def fake_quant_weights(self, weights: Sequence[Tensor], bits: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
        outs, scales = [], []
        for weight, width in zip(weights, bits, strict=True):
            if id(weight) not in self.modules:
                bound = 2 ** (width - 1) - 1
                self.modules[id(weight)] = FusedMovingAvgObsFakeQuantize(
                    MovingAveragePerChannelMinMaxObserver, -bound, bound, dtype=torch.qint8, ch_axis=0,
                    qscheme=torch.per_channel_symmetric, averaging_constant=1.0,
                )  # fmt: skip
            outs.append(self.modules[id(weight)](weight))
            scales.append(self.modules[id(weight)].scale)
        return outs, scales

    @contextmanager
    def in_place_of_ours(self) -> Iterator[None]:
        """Inside, whoever calls `dfq_kernels` gets these."""
        names = ("fake_quant", "observe_fake_quant", "bn_act_fake_quant", "fake_quant_weights")
        with mock.patch.multiple("dfq_kernels", **{name: getattr(self, name) for name in names}):
            yield


def calibrated(ranges: str, precision: str, batch_size: int) -> DataFreeTraining:
    """The loop of recipe `paper` on the embedded teacher, where the alternation begins."""
    recipe = replace(recipe_named("paper"), warm_up=1, ranges=ranges, batch_size=batch_size)
    quant = quant_config("W4A4", ranges=ranges)
    task = DataFreeTraining(
        load_teacher(), [prepare(load_teacher(), quant)], recipe, quant=quant, input_shape=INPUT_SHAPE, num_classes=10,
        steps=10**6, seed=0, device=torch.device("cpu"), precision=precision,
    )  # fmt: skip
    for index in range(task.warm_up_steps + task.calibration_steps):
        task.step(index)
    return task


def variants(ranges: str, precision: str, batch_size: int = 128) -> dict[str, Callable[[], float]]:
    """What makes the next step, ours and torch.ao's; each gives its loss."""
    ours, theirs = (calibrated(ranges, precision, batch_size) for _ in range(2))
    operators = TorchAo()
    theirs.bn_statistics = HookStatistics(theirs.teacher)
    steps = {"dfq-kernels": count(2), "torch.ao": count(2)}

    def step(name: str, task: DataFreeTraining) -> float:
        return float(task.step(next(steps[name]))["student0/distillation"])

    def their_step() -> float:
        with operators.in_place_of_ours():
            return step("torch.ao", theirs)

    return {"dfq-kernels": lambda: step("dfq-kernels", ours), "torch.ao": their_step}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, help="a JSON file for the results; default: one of this machine's name")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each measurement")
    arguments = parser.parse_args()
    keep_freed_memory()
    results: list[dict[str, Any]] = []
    for precision in ("bf16", "fp32"):
        for ranges in ("minmax", "lsq"):
            times = interleaved(variants(ranges, precision), seconds=arguments.seconds, least=5)
            rates = {f"{name} steps/s": round(1 / seconds.median, 2) for name, seconds in times.items()}
            ratio = round(times["torch.ao"].median / times["dfq-kernels"].median, 2)
            case = {"model": "wrn-16-1", "preset": "W4A4", "batch": 128, "precision": precision, "ranges": ranges}
            results.append({**case, **rates, "times_torch_ao": ratio})
            print(json.dumps(results[-1]), flush=True)
    write_results(arguments.out or results_file("steps"), results)


if __name__ == "__main__":
    main()
