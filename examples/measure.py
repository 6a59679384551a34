"""What every example does with a network that it did not write: quantize, export, compare, time."""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import dfq
from dfq.quant import prepared_of

HERE = Path(__file__).parent
BATCHES = (1, 3, 16)  # images at once: bits must be equal for every size
TIMES = 31


def network(
    name: str, model: nn.Module, calibrating: Sequence[Tensor], judging: Tensor, labels: Tensor | None = None
) -> dict[str, Any]:
    """Takes a float network to integers and says what became of it.

    Args:
        name: of the network, for whoever reads the facts.
        model: as its package builds it, with its own weights.
        calibrating: batches `[N, ...]` that set the ranges.
        judging: images `[N, ...]` on which both networks are compared; others than the ones before.
        labels: the right classes of `judging`, where they are known.
    """
    model, shape = model.eval(), tuple(judging.shape[1:])
    began = time.perf_counter()
    student = dfq.prepare(model, shape, preset="W8A8")
    dfq.calibrate(student, calibrating)
    student.eval()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.safetensors"
        engine = dfq.export_integers(student, path)
        seconds, size = time.perf_counter() - began, path.stat().st_size
    with torch.no_grad():
        equal = all(torch.equal(engine(part), student(part)) for part in _batches(judging))
        wanted, got = model(judging), engine(judging)
    one = judging[:1]
    facts = {
        "network": name, "input_shape": list(shape), "preset": "W8A8", "bit_equal": equal,
        "batches": [len(part) for part in _batches(judging)], "floating_point_calls": len(prepared_of(student).floats),
        "images_compared": len(judging), "relative_norm": round(float((got - wanted).norm() / wanted.norm()), 4),
        "top1_agreement": _percent(got.argmax(1) == wanted.argmax(1)),
    }  # fmt: skip
    if labels is not None:
        facts["top1_float"] = _percent(wanted.argmax(1) == labels)
        facts["top1_integers"] = _percent(got.argmax(1) == labels)
    return facts | {
        "bytes_float": sum(4 * value.numel() for value in model.state_dict().values() if value.is_floating_point()),
        "bytes_integers": size, "ms_float": _milliseconds(model, one), "ms_integers": _milliseconds(engine, one),
        "seconds_to_integers": round(seconds, 1),
    }  # fmt: skip


def write(path: Path, facts: Sequence[dict[str, Any]]) -> None:
    """Facts, and the machine, the commit and the day that they are of."""
    listed = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.partition(":")[2].strip() for line in listed if line.startswith("model name")), "unknown")
    git = ["git", "describe", "--always", "--dirty"] if shutil.which("git") else ["true"]
    commit = subprocess.run(git, capture_output=True, text=True, cwd=HERE).stdout.strip() or "unknown"
    machine = {
        "cpu": cpu, "threads": torch.get_num_threads(), "torch": str(torch.__version__), "commit": commit,
        "date": datetime.now(timezone.utc).date().isoformat(),
    }  # fmt: skip
    path.write_text(json.dumps({"machine": machine, "rows": list(facts)}, indent=2) + "\n")


def finish(facts: Sequence[dict[str, Any]], description: str | None) -> None:
    """Prints the facts of each network; `--json FILE` writes them."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, help="write the facts to this file")
    path = parser.parse_args().json
    for found in facts:
        print(f"{found['network']}: {'bit-equal' if found['bit_equal'] else 'NOT bit-equal'}")
        for name, value in found.items():
            print(f"    {name.replace('_', ' ')}: {value}")
    if path is not None:
        write(path, facts)
    if not all(found["bit_equal"] for found in facts):
        raise SystemExit(1)


def _batches(images: Tensor) -> list[Tensor]:
    """Parts of a few sizes."""
    parts, first = [], 0
    for size in BATCHES:
        parts.append(images[first : first + size])
        first += size
    return [part for part in parts if len(part)]


def _percent(same: Tensor) -> float:
    return round(100 * same.float().mean().item(), 2)


def _milliseconds(model: Callable[[Tensor], Any], images: Tensor) -> float:
    """The median time of one call, after three that do not count."""
    times = []
    with torch.no_grad():
        for _ in range(TIMES + 3):
            began = time.perf_counter()
            model(images)
            times.append(time.perf_counter() - began)
    return round(1e3 * statistics.median(times[3:]), 3)
