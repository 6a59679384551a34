"""Whole training steps against torch.ao and forward hooks: `python -m benchmarks.end_to_end [--out FILE] [--compiled]`.

One generator step and one student step of recipe `paper`, the loop of `dfq.method.trainer` in all variants. On a CPU:
WRN-16-1, batch 128. On a GPU: networks at CIFAR and ImageNet size, steps as they are, captured and compiled. What a
step must launch and move at least is computed (`benchmarks.predicted`) and stands beside as `predicted`.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import dfq_kernels
from benchmarks.machine import results_file
from benchmarks.outcome import finish
from benchmarks.predicted import predicted
from benchmarks.timing import interleaved
from benchmarks.torch_ao import HookStatistics, TorchAo
from dfq.cli.app import keep_freed_memory
from dfq.config import quant_config, recipe_named
from dfq.errors import first_line
from dfq.method.objective import classifier
from dfq.method.trainer import DataFreeTraining
from dfq.models import ModelSpec, build_model
from dfq.models.embedded import INPUT_SHAPE, load_teacher
from dfq.quant import prepare
from dfq.running.execution import WARM_UP, Execution
from dfq.running.seeds import seeded_initialisation

OURS = "dfq-kernels"
PRECISIONS = ("bf16", "fp32", "tf32")  # tf32: fp32 in which a GPU multiplies with 10 bits of mantissa


@dataclass(frozen=True)
class Workload:
    """A training step that is measured; `size` of its square images."""

    model: str = "wrn-16-1"
    size: int = 32
    batch: int = 128
    precision: str = "bf16"
    ranges: str = "minmax"
    preset: str = "W4A4"

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return INPUT_SHAPE if self.model == "wrn-16-1" else (3, self.size, self.size)


def workloads(device: torch.device) -> list[Workload]:
    if device.type == "cpu":
        return [Workload(precision=precision, ranges=ranges) for precision in ("bf16", "fp32")
                for ranges in ("minmax", "lsq")]  # fmt: skip
    sizes = [("wrn-16-1", 32, 256), ("wrn-40-2", 32, 256), ("resnet18", 224, 64), ("mobilenet-v2", 224, 64)]
    return [Workload(*size, precision=precision) for size in sizes for precision in PRECISIONS]


def teacher(work: Workload) -> nn.Module:
    """The embedded teacher, or a network of random weights whose batch norms have seen noise."""
    if work.model == "wrn-16-1":
        return load_teacher()
    with seeded_initialisation(0, "teacher"):
        model = build_model(ModelSpec(work.model, 3, 1000, "imagenet" if work.size > 64 else "cifar")).train()
        with torch.no_grad():
            for _ in range(5):
                model(torch.randn(8, *work.image_shape))
    return model.eval()


def calibrated(work: Workload, execution: Execution | None = None, device: str = "cpu") -> DataFreeTraining:
    """The loop of recipe `paper`, where the alternation begins."""
    recipe = replace(recipe_named("paper"), warm_up=1, ranges=work.ranges, batch_size=work.batch, calibration_batches=2)
    quant, net = quant_config(work.preset, ranges=work.ranges), teacher(work)
    classes = net(torch.zeros(1, *work.image_shape)).shape[1]
    task = DataFreeTraining(
        net, [prepare(teacher(work), work.image_shape, quant)], recipe, quant=quant, input_shape=work.image_shape,
        objective=classifier(classes), steps=10**6, seed=0, device=torch.device(device),
        precision="bf16" if work.precision == "bf16" else "fp32",
        execution=execution,
    )  # fmt: skip
    for index in range(task.first_step("student")):
        task.step(index)
    return task


class TorchCompile(Execution):
    """What a user would write; on a GPU with the longest search, and CUDA graphs of torch.compile's own."""

    def call(self, network: nn.Module, *inputs: Tensor | None, fullgraph: bool = False) -> Tensor:
        if network not in self._networks:
            mode = "max-autotune" if self.device.type == "cuda" else None
            self._networks[network] = torch.compile(network, mode=mode, dynamic=False)
        return super().call(network, *inputs)


def variants(work: Workload, device: torch.device, compiled: bool) -> dict[str, Callable[[], Any]]:
    """What makes a variant's next step, by name; each gives its metrics."""
    executions = {"dfq-kernels": Execution("off", device), "torch.ao": Execution("off", device)}
    if device.type == "cuda":
        executions["dfq-kernels captured"] = Execution("on", device)
    if compiled:
        executions["dfq-kernels compiled"] = Execution("off", device, compiled=True)
        executions["torch.ao compiled"] = TorchCompile("off", device, compiled=True)
        if device.type == "cuda":
            executions["dfq-kernels compiled and captured"] = Execution("on", device, compiled=True)
    return {name: _steps(name, work, execution) for name, execution in executions.items()}


def _steps(name: str, work: Workload, execution: Execution) -> Callable[[], Any]:
    task = calibrated(work, execution, execution.device.type)
    steps = count(task.first_step("student"))
    if name.startswith("dfq"):
        return lambda: task.step(next(steps))
    operators = TorchAo()
    task.fused_teacher, task.bn_statistics = task.teacher, HookStatistics(task.teacher)

    def their_step() -> Any:
        with operators.in_place_of_ours():
            return task.step(next(steps))

    return their_step


@contextmanager
def as_a_gpu_runs_it() -> Iterator[None]:
    """Inside, a CPU's student convolves the values, too, and in their type, which its weights come in."""
    values = import_module("dfq_kernels.fake_quant_conv2d.values")
    convolve = partial(dfq_kernels.fake_quant_conv2d, backend="reference")
    quantizers = import_module("dfq.quant.quantizers")

    def multiplied_type(device: str) -> torch.dtype | None:
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None

    with (
        mock.patch("dfq_kernels.fake_quant_conv2d", convolve), mock.patch.object(values, "FAST_AT_BF16", True),
        mock.patch.object(quantizers, "multiplied_type", multiplied_type),
    ):  # fmt: skip
        yield


def prediction(work: Workload) -> dict[str, Any]:
    """What a step must launch and move on a GPU, counted on the CPU: the row that a GPU's numbers stand beside."""

    def of(images: int) -> Callable[[], object]:
        step = _steps("dfq-kernels", replace(work, batch=images), Execution("off", torch.device("cpu")))
        step()  # optimizers have their state
        return step

    with as_a_gpu_runs_it():
        return {**asdict(work), "variant": "dfq-kernels", "predicted": True, **predicted(of, work.batch)}


def on_gpu(step: Callable[[], Any]) -> dict[str, Any]:
    """Peak memory, kernels and launches of one step."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as seen:
        step()
        torch.cuda.synchronize()
    events = seen.events() or []
    kernels = sum(event.device_type == torch.autograd.DeviceType.CUDA for event in events)
    launched = sum(event.name in ("cudaLaunchKernel", "cuLaunchKernel", "cudaLaunchKernelExC", "cudaGraphLaunch")
                   for event in events)  # fmt: skip
    return {"peak_gigabytes": round(torch.cuda.max_memory_allocated() / 1e9, 2), "kernels": kernels,
            "launches": launched}  # fmt: skip


def measure(work: Workload, device: torch.device, seconds: float, compiled: bool) -> Iterator[dict[str, Any]]:
    """One row for each variant."""
    torch.compiler.reset()
    return measured(work, variants(work, device, compiled), device, seconds)


def measured(
    work: Workload, steps: dict[str, Callable[[], Any]], device: torch.device, seconds: float
) -> Iterator[dict[str, Any]]:
    """One row for each step; one that fails is a row that says why."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = work.precision == "tf32"
    good, failed = {}, {}
    for name, step in steps.items():
        try:
            for _ in range(WARM_UP + 2):
                step()
            good[name] = step
        except RuntimeError as error:  # a baseline that cannot be compiled is a result, too
            failed[name] = first_line(error)
    times = interleaved(good, seconds=seconds, least=5) if good else {}
    for name, step in good.items():
        extra = on_gpu(step) if device.type == "cuda" else {}
        rate = round(1 / times[name].median, 2)
        eager = {"times_eager": round(times[OURS].median / times[name].median, 2)} if OURS in times else {}
        yield {**asdict(work), "variant": name, "steps_per_second": rate, **eager, **extra}
    for name, reason in failed.items():
        yield {**asdict(work), "variant": name, "red" if name.startswith(OURS) else "failed": reason}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, help="a JSON file for the results; default: one of this machine's name")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each measurement")
    parser.add_argument("--compiled", action="store_true", help="also compiled variants: minutes more")
    arguments = parser.parse_args()
    keep_freed_memory()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results: list[dict[str, Any]] = []

    def note(row: dict[str, Any]) -> None:
        results.append(row)
        print(json.dumps(row), flush=True)

    for work in workloads(torch.device("cuda")):
        if work.precision != "tf32":  # fp32's bytes and launches
            note(prediction(work))
    for work in workloads(device):
        for row in measure(work, device, arguments.seconds, arguments.compiled):
            note(row)
        gc.collect()
    finish(arguments.out or results_file("steps"), results)


if __name__ == "__main__":
    main()
