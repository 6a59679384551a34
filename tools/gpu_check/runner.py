"""Stages as processes: each starts when those before it have ended, however they ended, and has a limit."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tools.gpu_check.notes import count_rows, is_red, read_rows

ROOT = Path(__file__).parent.parent.parent
LEAST = 8.0  # seconds that are left, or a stage is not started
GRACE = 5.0  # seconds from the interrupt of a stage to its end by force
SHOWN, WIDEST = 8, 300  # reasons of a stage, and their characters
OK, RED, TIMED_OUT, NO_TIME, ABSENT = "ok", "red", "timed out", "no time", "absent"


@dataclass(frozen=True)
class Stage:
    """One process.

    log: the file of the output folder that gets what it prints; rows: the one that it writes JSON lines to.
    after: the names of the stages that must have ended; tests: its log ends with pytest's summary.
    absent: why it cannot run here; stand_in: what a dry run has in its place.
    """

    name: str
    command: tuple[str, ...]
    limit: float
    log: str
    rows: str = ""
    after: tuple[str, ...] = ()
    tests: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)
    absent: str = ""
    stand_in: str = ""


@dataclass(frozen=True)
class Outcome:
    """How a stage ended; counts: what it found, in words; reasons: lines that say why it is not ok."""

    stage: Stage
    seconds: float
    result: str
    counts: str
    reasons: tuple[str, ...] = ()


class _Running:
    def __init__(self, stage: Stage, out: Path, limit: float) -> None:
        self.stage, self.out, self.limit = stage, out, limit
        self.log = out / stage.log
        self.offset = self.log.stat().st_size if self.log.exists() else 0
        environment = {**os.environ, **stage.environment, "GPU_CHECK_SECONDS": f"{limit:.0f}"}
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                stage.command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env=environment, start_new_session=True
            )
        self.began, self.interrupted = time.monotonic(), 0.0

    def seconds(self) -> float:
        return time.monotonic() - self.began

    def ended(self) -> bool:
        """Whether the process has ended; one past its limit is interrupted, then killed."""
        if self.process.poll() is not None:
            self.signal(signal.SIGKILL)  # what it started and left behind would disturb the measurements
            return True
        if not self.interrupted and self.seconds() > self.limit:
            self.interrupted = self.seconds()
            self.signal(signal.SIGINT)
        elif self.interrupted and self.seconds() > self.interrupted + GRACE:
            self.signal(signal.SIGKILL)
        return False

    def signal(self, number: signal.Signals) -> None:
        """To the process and all that it started."""
        with contextlib.suppress(ProcessLookupError):  # nothing is left of it
            os.killpg(self.process.pid, number)

    def outcome(self) -> Outcome:
        with self.log.open(errors="replace") as log:
            log.seek(self.offset)
            printed = log.read()
        counts, found, red = counted(self.stage, self.out, printed)
        code = self.process.returncode
        result = OK if code == 0 and found and not red else RED
        if result == RED:
            counts = f"{counts}, exit code {code}" if counts else f"exit code {code}, see {self.stage.log}"
        result = TIMED_OUT if self.interrupted else result
        lines = () if result == OK else reasons(self.stage, self.out, printed)
        return Outcome(self.stage, self.seconds(), result, counts, lines)


def counted(stage: Stage, out: Path, printed: str) -> tuple[str, bool, bool]:
    """What a stage found, in words; whether it found anything; whether some of it is red."""
    if stage.tests:
        summary = [line for line in printed.splitlines() if re.search(r"\d+ (passed|failed|error)", line)][-1:]
        numbers = {word: int(n) for n, word in re.findall(r"(\d+) (\w+)", " ".join(summary).partition(" in ")[0])}
        text = ", ".join(f"{n} {word}" for word, n in numbers.items())
        return text or "no test ran", "passed" in numbers, bool({"failed", "error", "errors"} & numbers.keys())
    if stage.rows:
        good, red, skipped = count_rows(out / stage.rows, stage.name)
        words = ((good, "rows"), (red, "red"), (skipped, "without time"))
        return ", ".join(f"{n} {word}" for n, word in words if n or word == "rows"), bool(good), bool(red)
    return "", True, False


def reasons(stage: Stage, out: Path, printed: str) -> tuple[str, ...]:
    """Why a stage is not ok: its first red rows, the first tests that failed, or the last that it printed."""
    if stage.rows:
        lines = [json.dumps(row) for row in read_rows(out / stage.rows) if row["stage"] == stage.name and is_red(row)]
    else:
        lines = [line for line in printed.splitlines() if line.startswith(("FAILED", "ERROR", "SKIPPED without"))]
    return tuple(line[:WIDEST] for line in lines[:SHOWN] or printed.splitlines()[-3:])


def run(stages: Sequence[Stage], out: Path, budget: float, say: Callable[[str], None] = print) -> list[Outcome]:
    """Runs all stages within `budget` seconds; outcomes in the order of the stages."""
    names = {stage.name for stage in stages}
    assert all(names >= set(stage.after) for stage in stages), "a stage waits for one that is none"
    began, waiting, running = time.monotonic(), list(stages), list[_Running]()
    done: dict[str, Outcome] = {}

    def end(outcome: Outcome) -> None:
        done[outcome.stage.name] = outcome
        say(f"[{time.monotonic() - began:.0f} s] {outcome.stage.name}: {outcome.result} {outcome.counts}".rstrip())

    try:
        while waiting or running:
            for stage in [item for item in waiting if done.keys() >= set(item.after)]:
                waiting.remove(stage)
                left = budget - (time.monotonic() - began)
                if stage.absent:
                    end(Outcome(stage, 0.0, ABSENT, stage.absent))
                elif left < min(LEAST, stage.limit):
                    end(Outcome(stage, 0.0, NO_TIME, f"{left:.0f} of {budget:.0f} s were left"))
                else:
                    running.append(_Running(stage, out, min(stage.limit, left)))
            for one in [item for item in running if item.ended()]:
                running.remove(one)
                end(one.outcome())
            time.sleep(0.05)
    finally:
        for one in running:
            one.signal(signal.SIGKILL)
    return [done[stage.name] for stage in stages]


def table(outcomes: Sequence[Outcome]) -> str:
    """Stage, seconds, result, counts; and what stood in for what in a dry run."""
    rows = [("stage", "seconds", "result", "found")]
    for one in outcomes:
        stand_in = f"  [dry: {one.stage.stand_in}]" if one.stage.stand_in else ""
        rows.append((one.stage.name, f"{one.seconds:.1f}", one.result, one.counts + stand_in))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = (f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:<{widths[2]}}  {d}".rstrip() for a, b, c, d in rows)
    why = [f"{one.stage.name}: {reason}" for one in outcomes for reason in one.reasons]
    return "\n".join([*lines, *(["", "Why:", *why] if why else [])])
