"""Integer networks at work: a file in, a function from images to logits out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from dfq.engine import reference
from dfq.engine.check import check_graph
from dfq.engine.graph import IntegerGraph, Step
from dfq.engine.io import load_graph
from dfq.engine.native import NativeNetwork
from dfq.errors import check
from dfq_kernels import extension
from dfq_kernels.dispatch import BackendError

BACKENDS = ("native", "reference")
REFERENCE_BATCH = 100  # images at once: float64 takes memory


class Engine:
    """A network that runs in integers; thread-safe; the same bits from every backend and for every batch size.

    Args:
        graph: the network.
        device: `cpu`, or a GPU, where the reference runs.
        backend: `native` or `reference`; None takes the best that is there.

    Raises:
        ValueError: an unknown backend, or a graph that is no network.
        BackendError: an explicit backend that is not there.
    """

    def __init__(self, graph: IntegerGraph, device: torch.device | str = "cpu", backend: str | None = None) -> None:
        check("engine", "backend", backend, f"one of {', '.join(BACKENDS)}", backend is None or backend in BACKENDS)
        self.graph, self.device = graph, torch.device(device)
        reason = extension.missing("cpu") if self.device.type == "cpu" else f"it runs on the CPU, not on {self.device}"
        if backend == "native" and reason is not None:
            raise BackendError(f"engine: backend must be one that is there, got 'native': {reason}")
        self.backend = backend or ("native" if reason is None else "reference")
        if self.backend == "native":
            self._native = NativeNetwork(graph)
        else:
            check_graph(graph)
            self.graph = _on(self.device, graph)

    def __call__(self, images: Tensor) -> Tensor:
        """Logits, fp32 `[N, num_classes]`.

        Args:
            images: floating point `[N, C, H, W]`, normalised as the teacher's (`normalize`).

        Raises:
            ValueError: images of another shape or type, or with NaN in them.
        """
        shape = tuple(images.shape)
        check("engine", "images", shape, f"[N, {', '.join(map(str, self.graph.input_shape))}]",
              len(shape) == 4 and shape[1:] == self.graph.input_shape)  # fmt: skip
        check("engine", "images", images.dtype, "floating point (see normalize)", images.is_floating_point())
        if self.backend == "native":
            return self._native(images.detach().to(self.device))
        parts = images.detach().to(self.device).split(REFERENCE_BATCH)
        logits = [reference.run(self.graph, part)[self.graph.output] for part in parts]
        return torch.cat(logits)

    def normalize(self, pixels: Tensor) -> Tensor:
        """uint8 pixels `[N, C, H, W]` to the network's input: `(pixels / 255 - mean) / std`, fp32.

        Raises:
            ValueError: a network that was exported without mean and deviation.
        """
        check("engine", "images", "pixels", "normalised: the network was exported without a data set",
              self.graph.normalization is not None)  # fmt: skip
        assert self.graph.normalization is not None
        mean, std = (torch.tensor(part, device=pixels.device).view(-1, 1, 1) for part in self.graph.normalization)
        return (pixels.float() / 255 - mean) / std


def _on(device: torch.device, graph: IntegerGraph) -> IntegerGraph:
    """The network with its tensors on a device."""

    def moved(step: Step) -> Step:
        tensors = {name: value for name in step.tensors if (value := getattr(step, name)) is not None}
        return replace(step, **{name: value.to(device) for name, value in tensors.items()})  # type: ignore[arg-type]

    return replace(graph, steps=tuple(moved(step) for step in graph.steps))


def load(path: str | Path, device: torch.device | str = "cpu", backend: str | None = None) -> Engine:
    """The network of a file that `dfq export` wrote.

    Args:
        path, device, backend: as in `Engine`.

    Raises:
        CheckpointError: a file that is missing, damaged, or something else.
        ValueError, BackendError: as in `Engine`.
    """
    return Engine(load_graph(Path(path)), device, backend)
