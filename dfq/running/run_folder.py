"""One run, one folder: resolved config, versions, metrics (JSON lines and TensorBoard), pictures, checkpoints."""

from __future__ import annotations

import json
import os
import platform
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

from dfq.running import ranks
from dfq.running.checkpoint import CheckpointError, write_atomic
from dfq_kernels import __version__
from dfq_kernels.dispatch import chosen

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

BITS = "bits.json"
COMMON_KEYS = {"command", "model", "quant", "input_shape", "num_classes", "seed"}
"""What the config of every command has."""


class RunFolder:
    """Layout of a run's folder.

    config.json          resolved config, seed and versions
    bits.json            of weights by layer, where they were chosen
    metrics.jsonl        one line a step: step, phase, every loss term
    tensorboard/         the same for TensorBoard
    checkpoint.safetensors, model.safetensors, result.json, *.png

    Of several processes the first one writes, the others wait until it has looked at the folder.

    Args:
        path: the folder; created if missing.
        config: the resolved config; JSON values only.
        resume: continue what is in the folder; its config must be equal.

    Raises:
        CheckpointError: the folder holds a run and `resume` is False, or its config differs, or it cannot be written.
    """

    def __init__(self, path: Path, config: Mapping[str, Any], *, resume: bool) -> None:
        self.path = path
        self.checkpoint = path / "checkpoint.safetensors"
        self.model = path / "model.safetensors"
        self.integers = path / "integers.safetensors"
        self._metrics = path / "metrics.jsonl"
        self._writer: SummaryWriter | None = None
        self.writes = ranks.rank() == 0
        if self.writes:
            self._open(json.loads(json.dumps(config)), resume)
        ranks.wait()

    def _open(self, wanted: dict[str, Any], resume: bool) -> None:
        path, config_path = self.path, self.path / "config.json"
        if config_path.exists():
            if not resume:
                raise CheckpointError(
                    f"run: out must be a new folder or resume must be set, got {path} with a run in it"
                )
            self._compare(read_config(path), wanted)
            self._warn_of_other_bits()
        elif path.is_dir() and any(not item.name.startswith(".config.json.") for item in path.iterdir()):
            raise CheckpointError(
                f"run: out must be a new or empty folder, or one with a run, got {path} with other files"
            )
        else:
            self.write_json("config.json", {"config": wanted, "versions": versions()})

    def _compare(self, found: Any, wanted: Any, name: str = "") -> None:
        """Equal, or an error that names the innermost setting that differs."""
        if isinstance(found, dict) and isinstance(wanted, dict):
            for key in sorted(found.keys() | wanted.keys()):
                self._compare(found.get(key), wanted.get(key), f"{name}.{key}" if name else key)
        elif found != wanted:
            raise CheckpointError(f"run: {name} must be {found!r} to resume {self.path}, got {wanted!r}")

    def _warn_of_other_bits(self) -> None:
        before, now = read_json(self.path / "config.json").get("versions"), versions()
        before = before if isinstance(before, dict) else {}
        for key in ("torch", "threads", "kernels"):
            if before.get(key) != now[key]:
                warnings.warn(
                    f"run: {key} was {before.get(key)} when {self.path} began and is {now[key]} now; the result will "
                    "not have the bits of an uninterrupted run", stacklevel=2,
                )  # fmt: skip

    def write_json(self, name: str, value: Any) -> None:
        """Writes a file of the folder, whole or not at all."""
        write_atomic(self.path / name, (json.dumps(value, indent=2) + "\n").encode())

    def rewind(self, step: int) -> None:
        """Drops metrics of `step` and later: they were logged after the checkpoint that a resume starts from."""
        if not self.writes:
            return
        if self._metrics.exists():
            kept = [line for line in self._metrics.read_text(errors="replace").splitlines() if _step_of(line) < step]
            write_atomic(self._metrics, "".join(line + "\n" for line in kept).encode())
        if step == 0:
            shutil.rmtree(self.path / "tensorboard", ignore_errors=True)
        from torch.utils.tensorboard import SummaryWriter  # half a second, which only a run needs

        self._writer = SummaryWriter(str(self.path / "tensorboard"), purge_step=step)

    def log(self, step: int, phase: str, metrics: Mapping[str, float]) -> None:
        """Appends one line of metrics."""
        if not self.writes:
            return
        row = {"step": step, "phase": phase, **metrics}
        try:
            with self._metrics.open("a") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise CheckpointError(f"run: {self._metrics} cannot be written: {error.strerror}") from error
        if self._writer is not None:
            for name, value in metrics.items():
                self._writer.add_scalar(name, value, step)

    def metrics(self) -> list[dict[str, Any]]:
        """All rows logged so far."""
        return [json.loads(line) for line in self._metrics.read_text().splitlines()] if self._metrics.exists() else []

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is not None:  # flushes TensorBoard's events, of a failed run too
            self._writer.close()


def read_config(folder: Path) -> dict[str, Any]:
    """The resolved config of the run in `folder`, or a `CheckpointError`."""
    data = read_json(folder / "config.json")
    config = data.get("config") if isinstance(data, dict) else None
    if not isinstance(config, dict) or not config.keys() >= COMMON_KEYS:
        raise CheckpointError(f"run: {folder} must hold a run, got a config.json of something else")
    return config


def read_json(path: Path) -> Any:
    """A JSON file, or a `CheckpointError` that says what is wrong with it."""
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise CheckpointError(f"run: {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"run: {path} must be JSON, got {error}") from error


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # half a line, written when the power went


def versions() -> dict[str, str]:
    """What a reader needs to repeat a run."""
    return {
        "dfq-kernels": __version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": str(torch.get_num_threads()),
        "cpus": str(os.cpu_count()),
        "kernels": str(chosen("fake_quant", "cpu")),
    }
