"""Integer networks at work: a file in, a function from images to logits out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dfq.engine.graph import IntegerGraph, Output
from dfq.engine.io import load_graph
from dfq.engine.native import NativeNetwork
from dfq.engine.operators import OperatorNetwork
from dfq.engine.pixels import normalized
from dfq.errors import check
from dfq.execution import Execution
from dfq_kernels import dispatch, extension
from dfq_kernels.dispatch import BackendError

BACKENDS = ("native", "triton", "reference")
REFERENCE_BATCH = 100  # images at once: float64 takes memory


def missing(backend: str, device: torch.device) -> str | None:
    """Why a backend cannot run on a device; None if it can."""
    if backend == "native":
        return extension.missing("cpu") if device.type == "cpu" else f"it runs on the CPU, not on {device}"
    return dispatch.missing("int_conv2d", backend, device.type)


class Engine:
    """A network that runs in integers; thread-safe; the same bits from every backend and for every batch size.

    It can be pickled. In a process that was forked after the network was loaded, C++ works on one thread: those of
    OpenMP stay with the parent. Start processes by `spawn` to have threads in each.

    Args:
        graph: the network.
        device: `cpu`, or a GPU, where a CUDA graph is captured for every batch size (for the first 16 of them).
        backend: `native` (C++ on the CPU), `triton` or `reference`; None takes the best that is there.
        capture: `auto`, `on` or `off`, as in `dfq.execution.Execution`.

    Raises:
        ValueError: an unknown backend, a capture that cannot be, or a graph that is no network.
        BackendError: an explicit backend that is not there.
    """

    def __init__(
        self, graph: IntegerGraph, device: torch.device | str = "cpu", backend: str | None = None, capture: str = "auto"
    ) -> None:
        check("engine", "backend", backend, f"one of {', '.join(BACKENDS)}", backend is None or backend in BACKENDS)
        self.graph, self.device = graph, torch.device(device)
        if self.device.type == "cuda" and self.device.index is None and torch.cuda.is_available():
            self.device = torch.device("cuda", torch.cuda.current_device())  # other threads may have another one
        automatic = ("triton", "reference") if self.device.type == "cuda" else ("native", "reference")
        reasons = {name: missing(name, self.device) for name in ((backend,) if backend else automatic)}
        found = next((name for name, reason in reasons.items() if reason is None), None)
        if found is None:
            name, reason = next(iter(reasons.items()))
            raise BackendError(f"engine: backend must be one that is there, got {name!r}: {reason}")
        capturable = found == "triton" or capture in ("auto", "off")
        check("engine", "capture", capture, f"auto or off where {found} runs", capturable)
        self.backend, self._network = found, self._make(found, capture)
        orders = [output.order for output in graph.outputs]
        self._orders = [None if order is None else order.to(self.device) for order in orders]
        self._arguments = graph, str(device), backend, capture

    def __reduce__(self) -> tuple[type[Engine], tuple[IntegerGraph, str, str | None, str]]:
        return Engine, self._arguments

    def _make(self, backend: str, capture: str) -> Callable[[Tensor], dict[str, Tensor]]:
        if backend == "native":
            return NativeNetwork(self.graph)
        execution = Execution(capture if backend == "triton" else "off", self.device)
        return OperatorNetwork(self.graph, self.device, backend, execution)

    def __call__(self, images: Tensor) -> Any:
        """What the network returns, fp32: of a classifier logits `[N, num_classes]`; of several outputs a list or a
        dict, as the network that was exported.

        Args:
            images: `[N, *input_shape]`, floating point, normalised as the teacher's (`normalize`); or pixels in uint8,
                where the network knows their mean and deviation.

        Raises:
            ValueError: images of another shape or type, or with NaN in them.
        """
        shape, dtype = tuple(images.shape), images.dtype
        if shape[1:] != self.graph.input_shape or len(shape) < 2:
            rule = f"[N, {', '.join(map(str, self.graph.input_shape))}]"
            check("engine", "images", shape, rule, False)
        pixels = dtype == torch.uint8 and self.graph.normalization is not None
        check("engine", "images", dtype, "floating point (see normalize)", pixels or dtype.is_floating_point)
        images = images.detach().to(self.device)
        if not pixels:
            images = images.float()
        elif self.backend != "native":
            images = self.normalize(images)
        if self.backend != "reference":
            return nested(self.graph.structure, self._outputs(self._network(images)))
        parts = [self._outputs(self._network(part)) for part in images.split(REFERENCE_BATCH)]
        return nested(self.graph.structure, [torch.cat(same) for same in zip(*parts, strict=True)])

    def _outputs(self, reals: dict[str, Tensor]) -> list[Tensor]:
        pairs = zip(self.graph.outputs, self._orders, strict=True)
        return [output_of(output, reals[output.value], order) for output, order in pairs]

    def normalize(self, pixels: Tensor) -> Tensor:
        """uint8 pixels `[N, *input_shape]` to the network's input: `(pixels / 255 - mean) / std`, fp32.

        Raises:
            ValueError: a network whose file holds no mean and deviation, because nobody said them.
        """
        known = self.graph.normalization
        check("engine", "images", "pixels", "normalised: the network was exported without --mean and --std",
              known is not None)  # fmt: skip
        assert known is not None
        return normalized(pixels, known)


def output_of(output: Output, real: Tensor, order: Tensor | None) -> Tensor:
    """One result `[N, *shape]` of the real numbers that it is made of; order: of `Output`, on their device."""
    shape = (len(real), *output.shape)
    if order is not None:
        real = real.flatten(1).index_select(1, order)
    real = real if tuple(real.shape) == shape else real.reshape(shape)
    if output.function is None:
        return real
    return _FUNCTIONS[output.function](real, dim=output.axis)


def nested(structure: Any, outputs: list[Tensor]) -> Any:
    """Outputs in the places of their numbers."""
    if isinstance(structure, dict):
        return {key: nested(item, outputs) for key, item in structure.items()}
    if isinstance(structure, list):
        return [nested(item, outputs) for item in structure]
    return outputs[structure]


_FUNCTIONS: dict[str, Callable[..., Tensor]] = {"softmax": torch.softmax, "log_softmax": torch.log_softmax}


def load(path: str | Path, device: torch.device | str = "cpu", backend: str | None = None) -> Engine:
    """The network of a file that `dfq export` wrote.

    Args:
        path, device, backend: as in `Engine`.

    Raises:
        CheckpointError: a file that is missing, damaged, or something else.
        ValueError, BackendError: as in `Engine`.
    """
    return Engine(load_graph(Path(path)), device, backend)
