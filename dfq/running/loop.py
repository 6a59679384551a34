"""The one training loop: steps, metrics, the non-finite guard, checkpoints, interruption, resume.

Whoever trains supplies an object with `step(index) -> metrics`, `state_dict()` and `load_state_dict()`. All randomness
of a step is a function of its index (`dfq.running.seeds`), so that a resumed run repeats the same bits.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor

from dfq.errors import first_line
from dfq.running import ranks
from dfq.running.checkpoint import CheckpointError, load_tree, save_tree
from dfq.running.run_folder import RunFolder


class Trainable(Protocol):
    """What `run_loop` drives."""

    total_steps: int

    def step(self, index: int) -> Mapping[str, Tensor]: ...

    def phase(self, index: int) -> str: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Observer(Protocol):
    """Sees every step; a progress bar, for instance."""

    def on_step(self, phase: str, index: int, total: int, metrics: Mapping[str, float]) -> None: ...


class NonFiniteError(RuntimeError):
    """A loss term became NaN or infinite."""


class Interrupted(Exception):
    """Ctrl-C or SIGTERM; the state is saved, `resume` continues."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number


def run_loop(
    task: Trainable, folder: RunFolder, *, resume: bool, observer: Observer | None = None, save_seconds: float = 60.0
) -> None:
    """Runs `task` to its end, from the folder's checkpoint if `resume` and there is one.

    Args:
        save_seconds: seconds between checkpoints; one more is written at the end and one at an interruption.

    Raises:
        NonFiniteError: names the term and the step; the last checkpoint stays as it was.
        Interrupted: after saving the state.
    """
    start = 0
    if resume and folder.checkpoint.exists():
        start = _restore(task, folder.checkpoint)
    infinite = set(_not_finite(task.state_dict()))  # by intention: a mask, a range that has seen nothing
    ranks.wait()  # nobody reads what is rewritten
    folder.rewind(start)
    saved_at = time.monotonic()
    with _signals() as received:
        for index in range(start, task.total_steps):
            metrics = _read(task.step(index))
            _refuse_non_finite(metrics, index, task.phase(index), folder)
            folder.log(index, task.phase(index), metrics)
            if observer is not None:
                observer.on_step(task.phase(index), index, task.total_steps, metrics)
            stop = ranks.anywhere(bool(received))
            due = time.monotonic() - saved_at >= save_seconds
            if folder.writes and (due or stop or index + 1 == task.total_steps):
                state = {"next_step": index + 1, "task": task.state_dict()}
                _refuse_non_finite_state(state["task"], infinite, index, folder)
                save_tree(folder.checkpoint, state)
                saved_at = time.monotonic()
            if stop and index + 1 < task.total_steps:
                message = f"interrupted after step {index + 1} of {task.total_steps}; continue with --resume"
                raise Interrupted(message, received[0] if received else signal.SIGTERM)


def _read(metrics: Mapping[str, Tensor]) -> dict[str, float]:
    """The numbers of a step's metrics, in one transfer: the only time that a step is waited for."""
    values = torch.stack(list(metrics.values())).tolist() if metrics else []
    return dict(zip(metrics, values, strict=True))


def _restore(task: Trainable, path: Path) -> int:
    """Loads the checkpoint into `task`; the step that comes next."""
    state = load_tree(path)
    try:
        start = state["next_step"]
        if type(start) is not int or not 0 <= start <= task.total_steps:
            raise ValueError(f"next_step must be in [0, {task.total_steps}], got {start!r}")
        if nan := [name for name, has_nan in _not_finite(state["task"]).items() if has_nan]:
            raise ValueError(f"{nan[0]} has NaN in it")
        task.load_state_dict(state["task"])
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise CheckpointError(f"checkpoint: {path} must be of this run, got a damaged one ({reason})") from error
    return start


def _refuse_non_finite(metrics: Mapping[str, float], index: int, phase: str, folder: RunFolder) -> None:
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise NonFiniteError(
                f"train: {name} must be finite, got {value} at step {index + 1} ({phase}); "
                f"lower the learning rate or the weight of this term; {_what_is_left(folder)}"
            )


def _refuse_non_finite_state(state: Any, infinite: set[str], index: int, folder: RunFolder) -> None:
    """An update can ruin weights whose loss was finite: such a state must not replace the last good checkpoint."""
    for name, has_nan in _not_finite(state).items():
        if has_nan or name not in infinite:
            raise NonFiniteError(
                f"train: {name} must be finite, got {'NaN' if has_nan else 'infinity'} after step {index + 1}; "
                f"lower the learning rate; {_what_is_left(folder)}"
            )


def _what_is_left(folder: RunFolder) -> str:
    if folder.checkpoint.exists():
        return f"the last checkpoint is in {folder.path}"
    return f"nothing is saved, begin again in another folder than {folder.path}"


def _not_finite(state: Any, name: str = "") -> dict[str, bool]:
    """Tensors of a tree that hold NaN or infinities, by their place in it, and whether there is a NaN."""
    if isinstance(state, Tensor):
        if not state.is_floating_point() or bool(state.isfinite().all()):
            return {}
        return {name: bool(state.isnan().any())}
    if not isinstance(state, (dict, list, tuple)):
        return {}
    found: dict[str, bool] = {}
    for place, item in state.items() if isinstance(state, dict) else enumerate(state):
        found |= _not_finite(item, f"{name}/{place}" if name else str(place))
    return found


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM instead of dying in the middle of a step; a second Ctrl-C is obeyed at once."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def note(number: int, frame: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
