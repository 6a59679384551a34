"""How steps run: as they are, with compiled networks, or as captured CUDA graphs.

Captured, what a step launches is recorded once and replayed, with no Python in between.

A step is a function of tensors that reads everything else (weights, optimizers, schedules, ranges) from tensors that
stay where they are. Its first `WARM_UP` calls run as they are, on a stream of their own: kernels are loaded, cuDNN
chooses, optimizers make their state. They are steps like all others; nothing is run twice. The next call is recorded,
and from then on replayed. Where nothing is captured the same functions are called, so a CPU runs the same code.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from dfq.errors import check, first_line
from dfq.running import ranks

MODES = ("auto", "on", "off")
WARM_UP = 3

T = TypeVar("T")


class ExecutionError(RuntimeError):
    """A step that had to be captured or compiled, and cannot be."""


class Recorder(Protocol):
    """Who records a step."""

    def warm_up(self, function: Callable[[], T]) -> T:
        """Runs the step where it will be recorded."""

    def record(self, function: Callable[[], T]) -> tuple[Callable[[], None], T]:
        """Records the step without running it: what runs it, and its results, which every run writes anew.

        Any other step's run may write over them: they lie in memory that all steps share.
        """


class CudaGraphs:
    """Records into CUDA graphs that share one pool of memory: they run one after the other, never two at once.

    A graph that was recorded earlier may have had its own intermediate values where a later one's results lie.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream, self.pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def warm_up(self, function: Callable[[], T]) -> T:
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            result = function()
        current.wait_stream(self.stream)
        return result

    def record(self, function: Callable[[], T]) -> tuple[Callable[[], None], T]:
        graph = torch.cuda.CUDAGraph()
        with (
            torch.cuda.device(self.device),
            torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"),
        ):
            result = function()
        return graph.replay, result


class _Recorded:
    """A recorded step and its own inputs; results are copies, made before another step can run."""

    def __init__(self, function: Callable[..., Any], inputs: tuple[Tensor | None, ...], recorder: Recorder) -> None:
        self.inputs = [None if value is None else value.clone() for value in inputs]
        self.replay, self.result = recorder.record(lambda: function(*self.inputs))

    def __call__(self, *inputs: Tensor | None) -> Any:
        for own, value in zip(self.inputs, inputs, strict=True):
            if own is not None and value is not None:
                own.copy_(value)
        self.replay()
        return tree_map_only(Tensor, Tensor.clone, self.result)


class Execution:
    """Calls steps, or records and replays them; calls networks, or what `torch.compile` makes of them.

    Args:
        mode: `auto` captures on a GPU, in one process, and runs steps as they are where that fails, with one warning;
            `on` captures or raises; `off` does not.
        device: where the steps run.
        compiled: whether networks are compiled, in the first step that calls them.
        recorder: who records; default: CUDA graphs.

    Raises:
        ValueError: an unknown mode, or `on` without a GPU.
    """

    def __init__(
        self, mode: str, device: torch.device, *, compiled: bool = False, recorder: Recorder | None = None
    ) -> None:
        check("dfq", "capture", mode, f"one of {', '.join(MODES)}", mode in MODES)
        on_gpu = device.type == "cuda"
        check("dfq", "capture", mode, f"auto or off on {device.type}", mode != "on" or on_gpu or recorder is not None)
        several = ranks.world() > 1  # messages between processes are not recorded
        check("dfq", "capture", mode, "auto or off in several processes", mode != "on" or not several)
        self.mode, self.device, self.compiled, self._recorder = mode, device, compiled, recorder
        self._networks: dict[nn.Module, Callable[..., Tensor]] = {}
        if mode == "off" or several:
            self._recorder = None
        elif recorder is None and on_gpu:
            self._recorder = CudaGraphs(device)
        self.reset()

    def reset(self) -> None:
        """Forgets what is recorded: the tensors that it reads are others now."""
        self._calls: Counter[Hashable] = Counter()
        self._recorded: dict[Hashable, _Recorded] = {}

    @property
    def recorded(self) -> list[Hashable]:
        """The names of the steps that are replayed."""
        return list(self._recorded)

    def call(self, network: nn.Module, *inputs: Tensor | None, fullgraph: bool = False) -> Tensor:
        """`network(*inputs)`; compiled, `fullgraph` raises `ExecutionError` where one graph cannot hold it."""
        if not self.compiled:
            result: Tensor = network(*inputs)
            return result
        from torch._dynamo.exc import TorchDynamoException  # a second to import

        if network not in self._networks:
            self._networks[network] = torch.compile(network, fullgraph=fullgraph, dynamic=False)
        try:
            return self._networks[network](*inputs)
        except TorchDynamoException as error:
            reason = f"compile: {type(network).__name__} cannot be compiled: {first_line(error)}"
            raise ExecutionError(reason) from error

    def step(self, name: Hashable, function: Callable[..., T], *inputs: Tensor | None) -> T:
        """`function(*inputs)`; the results are the caller's, whatever runs next.

        Args:
            name: of the step; always with the same function and inputs of the same shapes.
        """
        if self._recorder is None:
            return function(*inputs)
        if name not in self._recorded:
            self._calls[name] += 1
            if self._calls[name] <= WARM_UP:
                return self._recorder.warm_up(lambda: function(*inputs))
            try:
                self._recorded[name] = _Recorded(function, inputs, self._recorder)
            except (ExecutionError, torch.OutOfMemoryError):
                raise
            except RuntimeError as error:
                self._give_up(name, error)
                return function(*inputs)
        result: T = self._recorded[name](*inputs)
        return result

    def _give_up(self, name: Hashable, error: RuntimeError) -> None:
        cause: BaseException = error
        while cause.__context__ is not None:  # ending a capture that has failed fails, too, and says less
            cause = cause.__context__
        reason = f"capture: step {name} cannot be captured: {first_line(cause)}"
        if self.mode == "on":
            raise ExecutionError(reason) from error
        warnings.warn(f"{reason}; steps run as they are", RuntimeWarning, stacklevel=3)
        self._recorder = None
        self.reset()
