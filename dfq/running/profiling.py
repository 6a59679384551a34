"""Where the time of a run goes: a Chrome trace of its last steps, and a table by operator."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from dfq.running.checkpoint import write_atomic
from dfq.running.loop import Trainable

PROFILED_STEPS = 10
TRACE, TABLE = "trace.json", "profile.txt"


class Profiled:
    """A task as it is, but its last `PROFILED_STEPS` steps are watched; the last one writes `TRACE` and `TABLE`.

    The last ones, because by then everything is compiled, captured and in its place.
    """

    def __init__(self, task: Trainable, folder: Path) -> None:
        self.task, self.folder, self.total_steps = task, folder, task.total_steps
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its own lines on standard error, when it starts and stops
        self.profile = profile(activities=activities, acc_events=True)
        self.watching = False

    def step(self, index: int) -> Mapping[str, Tensor]:
        if not self.watching and index >= self.total_steps - PROFILED_STEPS:
            self.profile.start()
            self.watching = True
        metrics = self.task.step(index)
        if index + 1 == self.total_steps:
            self.profile.stop()
            self._write()
        return metrics

    def _write(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            trace = Path(folder) / TRACE
            self.profile.export_chrome_trace(str(trace))
            write_atomic(self.folder / TRACE, trace.read_bytes())
        order = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = self.profile.key_averages().table(sort_by=order, row_limit=50, max_name_column_width=60)
        write_atomic(self.folder / TABLE, f"{table}\n".encode())

    def phase(self, index: int) -> str:
        return self.task.phase(index)

    def state_dict(self) -> dict[str, Any]:
        return self.task.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.task.load_state_dict(state)
