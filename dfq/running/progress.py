"""A progress bar with loss terms and time left."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SHOWN_TERMS = 4


class ProgressBar:
    """Context that draws one bar for a whole run; an `Observer` of `dfq.running.loop`."""

    def __init__(self, console: Console) -> None:
        self.progress = Progress(
            TextColumn("{task.fields[phase]}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[terms]}"), console=console,
        )  # fmt: skip

    def __enter__(self) -> ProgressBar:
        self.task = self.progress.add_task("", phase="", terms="", total=None)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.progress.live.is_started:  # one that has not would print an empty line
            self.progress.stop()

    def on_start(self, plan: str) -> None:
        self.progress.console.print(plan, markup=False, highlight=False)

    def on_step(self, phase: str, index: int, total: int, metrics: Mapping[str, float]) -> None:
        self.progress.start()  # at the first step, so that a wrong argument is answered by one line alone
        terms = "  ".join(
            f"{name.rpartition('/')[2]} {value:.3f}" for name, value in list(metrics.items())[-SHOWN_TERMS:]
        )
        self.progress.update(self.task, completed=index + 1, total=total, phase=phase, terms=terms)


class Silent:
    """No bar: for `--json`, where the output is for a program."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, *exc: object) -> None:
        return None
