"""`python -m tools.gpu_check [--dry | --full] [--budget SECONDS] [--out FOLDER]`, or `--collect FOLDER`."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from itertools import count
from pathlib import Path

from tools.gpu_check import stages
from tools.gpu_check.runner import OK, ROOT, run, table

BUDGET, FULL_BUDGET = 455.0, 4 * 3600.0
TITLE = "DRY: stand-ins on a CPU. No number is a measurement."


def check(out: Path, budget: float, *, dry: bool, full: bool) -> int:
    """Runs the stages and prints the table; the exit code: 1 if any stage is not ok."""
    out.mkdir(parents=True, exist_ok=True)
    if old := sorted(path.name for path in out.iterdir()):
        raise SystemExit(f"gpu_check: {out} must be empty, got {', '.join(old[:5])}")
    fast = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="gpu_check", dir=fast if fast.is_dir() else None) as cache:
        chosen = stages.full() if full else stages.staged()
        chosen = [stages.dry(stage) for stage in chosen] if dry else chosen
        outcomes = run(stages.prepared(chosen, out, Path(cache)), out, budget)
    text = "\n".join([*([TITLE] if dry else []), table(outcomes)])
    print(f"\n{text}\n\nin {out}", flush=True)
    with (out / chosen[0].log).open("a") as file:
        file.write(f"\n{text}\n")
    return int(any(outcome.result != OK for outcome in outcomes))


def a_gpu_is_there() -> bool:
    """Whether there is a trace of one, without the seconds that torch takes to say so."""
    return shutil.which("nvidia-smi") is not None or Path("/dev/nvidiactl").exists()


def next_folder(runs: Path) -> Path:
    """`runs/1`, or the first number that is free."""
    return next(folder for index in count(1) if not (folder := runs / str(index)).exists())


def main() -> None:
    parser = argparse.ArgumentParser(description="What to do in the first minutes on a GPU.")
    parser.add_argument(
        "--dry", action="store_true", default=os.environ.get("DRY", "0") not in ("", "0"), help="on the CPU, stand-ins"
    )
    parser.add_argument("--full", action="store_true", help="everything, which takes an hour")
    parser.add_argument("--budget", type=float, default=os.environ.get("BUDGET"), help=f"seconds; default {BUDGET:.0f}")
    parser.add_argument("--out", type=Path, default=os.environ.get("OUT"), help="default: the next in build/gpu-check")
    parser.add_argument("--collect", type=Path, metavar="FOLDER", help="result files from the rows of a check")
    parser.add_argument("--commit", help="with --collect: of the code that was checked")
    options = parser.parse_args()
    if options.dry and options.full:
        parser.error("--dry is of the staged check")
    if options.collect:
        from tools.gpu_check.collect import collect

        print("\n".join(str(path) for path in collect(options.collect, options.commit)))
        return
    if not options.dry and not a_gpu_is_there():
        raise SystemExit(
            "gpu_check: a GPU must be there, got neither its driver nor nvidia-smi (--dry runs without one)"
        )
    out = Path(options.out).resolve() if options.out else next_folder(ROOT / "build" / "gpu-check")
    budget = float(options.budget or (FULL_BUDGET if options.full else BUDGET))
    sys.exit(check(out, budget, dry=options.dry, full=options.full))


if __name__ == "__main__":
    main()
