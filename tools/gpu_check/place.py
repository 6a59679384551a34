"""Where the parts of the check run: a GPU, or stand-ins on the CPU that show that a part still runs to its end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from benchmarks.integer import network
from benchmarks.timing import Seconds
from dfq.engine import Engine, IntegerGraph
from dfq.engine.operators import OperatorNetwork
from dfq.method.trainer import DataFreeTraining
from dfq.running.execution import Execution, Recorder


class Place:
    """A GPU. A captured step is a CUDA graph."""

    dry = False

    def __init__(self) -> None:
        self.device = torch.device("cuda")

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def pick(self, real: Any, dry: Any) -> Any:
        """A size: of the check, or of its dry run."""
        return dry if self.dry else real

    def execution(self, mode: str, work: DataFreeTraining) -> Execution:
        """How `work` runs its steps."""
        return Execution(mode, self.device)

    def model(self, name: str) -> tuple[nn.Module, tuple[int, int, int]]:
        """A float network, and the shape of its images."""
        return network(name, 32)

    def network(self, graph: IntegerGraph) -> tuple[Callable[[Tensor], Tensor], Execution]:
        """An integer network that is captured, and what has captured it."""
        engine = Engine(graph, self.device, "triton", "on")
        captured = engine._network
        assert isinstance(captured, OperatorNetwork)
        return engine, captured.execution

    def capture(self, call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """A graph of `call`, captured on a stream of its own, and its results."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
            results = call()
        return graph.replay, results

    def microseconds(self, call: Callable[[], object], count: int = 100) -> float:
        """Of one call, by the GPU's clock."""
        for _ in range(3):
            call()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        for _ in range(count):
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / count * 1e3

    @contextmanager
    def timing(self) -> Iterator[None]:
        """Inside, benchmarks capture their calls."""
        yield


class Dry(Place):
    """The CPU: Triton's interpreter, the recorder of the tests in place of CUDA graphs, sizes of nothing."""

    dry = True

    def __init__(self) -> None:
        self.device = torch.device("cpu")

    def synchronize(self) -> None:
        pass

    def execution(self, mode: str, work: DataFreeTraining) -> Execution:
        if mode == "off":
            return Execution("off", self.device)
        return Execution("on", self.device, recorder=_recorder(lambda: tensors(work.state_dict())))

    def model(self, name: str) -> tuple[nn.Module, tuple[int, int, int]]:
        layers = nn.Conv2d(2, 4, 3, 1, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4, 4)).eval(), (2, 4, 4)

    def network(self, graph: IntegerGraph) -> tuple[Callable[[Tensor], Tensor], Execution]:
        execution = Execution("on", self.device, recorder=_recorder(list))
        made = OperatorNetwork(graph, self.device, "triton", execution)

        def logits(images: Tensor) -> Tensor:
            (found,) = made(images).values()
            return found.flatten(1)

        return logits, execution

    def capture(self, call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        return _recorder(list).record(call)

    def microseconds(self, call: Callable[[], object], count: int = 100) -> float:
        began = time.perf_counter()
        call()
        return (time.perf_counter() - began) * 1e6

    @contextmanager
    def timing(self) -> Iterator[None]:
        """Inside, a captured call is the call, and every call takes a second, but for the ceilings."""

        class Called:
            def __init__(self, call: Callable[[], Any]) -> None:
                self.replay = call

        def interleaved(variants: Mapping[str, Callable[[], object]], **_: Any) -> dict[str, Seconds]:
            for call in variants.values():
                call()
            return {name: Seconds(*[0.0 if name in ("copy", "read") else 1.0] * 2) for name in variants}

        with ExitStack() as patches:
            record = mock.patch("benchmarks.timing.record", lambda call, count=1: (Called(call), call()))
            patches.enter_context(record)
            for name in ("timing", "run", "layers", "end_to_end"):
                patches.enter_context(mock.patch(f"benchmarks.{name}.interleaved", interleaved))
            yield


def place(dry: bool) -> Place:
    """Where this part runs.

    Raises:
        SystemExit: there is no GPU, or Triton would not run on it.
    """
    if dry:
        return Dry()
    from dfq_kernels import dispatch

    if not torch.cuda.is_available():
        raise SystemExit("gpu_check: a GPU must be there, got none that torch sees (--dry runs without one)")
    if (reason := dispatch.missing("int_conv2d", "triton", "cuda")) is not None:
        raise SystemExit(f"gpu_check: Triton must be there: {reason}")
    return Place()


def _recorder(changed: Callable[[], list[Tensor]]) -> Recorder:
    from tests.recorded_steps import RecordedSteps

    return RecordedSteps(changed)  # type: ignore[return-value]


def tensors(tree: Any) -> list[Tensor]:
    """The tensors of a state."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
