"""The stages, most valuable first.

Beside each other: the build, and Triton's conformance, which needs no build (its kernels compile for minutes). Then
smoke, the engine's bits and the native conformance share the GPU: they judge, and nothing is timed. Then measurements,
one by one, alone on the machine: engine and steps say most, operators refine; last what is left of Triton's tests.
Expected on 16 cores and a Hopper GPU: build 35 s, all checks by 150 s, measurements to 455 s.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path

from tools.gpu_check.runner import ROOT, Stage

# TRITON_INTERPRET: tests/conftest.py would set 1, and "GPU" tests would run Triton's interpreter on the CPU
COMMON = {"TRITON_INTERPRET": "0", "PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(ROOT),
          "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}  # fmt: skip
# gradients of the reference are compared at 1e-5, TF32 is off by 1e-3; workers beside each other, one thread each
TESTS = {"NVIDIA_TF32_OVERRIDE": "0", "OMP_NUM_THREADS": "1"}
DRY = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
ENGINES = [("wrn-16-1", preset, "1,5,128,1024") for preset in ("W8A8", "W4A8", "W4A4", "W2A2")]
ENGINES.append(("mobilenet-v2", "W4A4", "5,128"))
CONFORMANCE = "tests/test_conformance.py"
MEASURED = (("engine", 75, "5-engine.jsonl"), ("steps", 80, "6-steps.jsonl"), ("layers", 55, "7-bench.jsonl"),
            ("operators", 90, "7-bench.jsonl"))  # fmt: skip
STAND_INS = {"environment": "none needed", "build": "ninja's file, nothing is compiled"}
CHECKS = ("smoke", *(f"bits {name} {preset}" for name, preset, _ in ENGINES), "native tests", "triton tests")


def module(name: str, *options: str) -> tuple[str, ...]:
    return (sys.executable, "-m", f"tools.gpu_check.{name}", *options)


def pytest(*options: str) -> tuple[str, ...]:
    """Without the options of pyproject.toml, which need a plugin that such a machine may not have."""
    settings = ("-o", "addopts=--strict-markers", "-p", "no:cacheprovider", "--tb=short")
    return (sys.executable, "-m", "pytest", *settings, *options)


def part(
    stage: str, source: str, *options: str, limit: float, rows: str, after: tuple[str, ...], threads: int
) -> Stage:
    """A stage that is a module of this package and writes rows."""
    command = module(source, *options, "--rows", "{out}/" + rows, "--stage", stage)
    environment = {"OMP_NUM_THREADS": str(threads)}
    return Stage(stage, command, limit, "0-env.txt", rows=rows, after=after, environment=environment)


def tests(stage: str, log: str, workers: int, which: str, *files: str, limit: float, after: tuple[str, ...]) -> Stage:
    """A stage that runs tests on the GPU; which: pytest's -k."""
    command = pytest(CONFORMANCE, *files, "-m", "gpu", "-n", str(workers), "-k", which)
    return Stage(stage, command, limit, log, after=after, tests=True, environment=TESTS)


def staged() -> list[Stage]:
    """`make gpu`: eight minutes."""
    built, triton = ("build",), "(equals_reference and triton) or tensor_cores"
    stages = [
        Stage("environment", module("environment"), 40, "0-env.txt"),
        Stage("build", module("build"), 150, "1-build.log"),
        tests("triton tests", "3-triton.log", 10, triton, "tests/test_tensor_cores.py", limit=140, after=()),
        part("smoke", "smoke", limit=130, rows="2-smoke.jsonl", after=built, threads=4),
    ]
    for name, preset, batches in ENGINES:
        bits = part(f"bits {name} {preset}", "engine_bits", name, preset, batches, limit=100, rows="5-engine.jsonl",
                    after=built, threads=2)  # fmt: skip
        stages.append(bits)
    more = ("tests/test_steps.py", "tests/test_execution.py")
    stages.append(tests("native tests", "4-native.log", 6, "not triton", *more, limit=90, after=built))
    before = CHECKS
    for what, limit, rows in MEASURED:
        stages.append(part(f"measure {what}", "measure", what, limit=limit, rows=rows, after=before, threads=8))
        before = (f"measure {what}",)
    rest = "triton and not equals_reference"
    return [*stages, tests("other triton tests", "3-triton.log", 12, rest, limit=60, after=before)]


def full() -> list[Stage]:
    """`make gpu-full`: every architecture is built, the whole suite, the sanitizer, every benchmark; an hour."""
    python, hour = sys.executable, 3600.0
    sanitizer = shutil.which("compute-sanitizer")
    absent = "" if sanitizer else "compute-sanitizer was not found"
    views = pytest(CONFORMANCE, "-m", "gpu", "-k", "misaligned or slice or transposed or expanded")
    sanitized = (str(sanitizer), "--error-exitcode", "1", *views)
    stages = [
        Stage("build", (python, "setup.py", "-q", "build_ext", "--inplace"), 900, "build.log"),
        Stage("tests", pytest("-m", "gpu"), hour, "tests.log", tests=True, environment=TESTS),
        Stage("sanitizer", sanitized, hour, "sanitizer.log", tests=True, environment=TESTS, absent=absent),
        Stage("kernels", (python, "-m", "benchmarks.run"), hour, "kernels.log"),
        Stage("steps", (python, "-m", "benchmarks.end_to_end", "--compiled"), hour, "steps.log"),
        Stage("layers", (python, "-m", "benchmarks.layers"), hour, "layers.log"),
        Stage("integer", (python, "-m", "benchmarks.integer", "--seconds", "2"), hour, "integer.log"),
    ]
    names = ["", *(stage.name for stage in stages)]
    return [replace(stage, after=(before,) if before else ()) for stage, before in zip(stages, names, strict=False)]


def dry(stage: Stage) -> Stage:
    """The same stage on the CPU; its tests are those of one operator."""
    environment = {**stage.environment, **DRY}
    if not stage.tests:
        options = () if stage.name == "environment" else ("--dry",)
        stand_in = STAND_INS.get(stage.name, "CPU, interpreter, recorder, tiny sizes")
        return replace(stage, command=(*stage.command, *options), environment=environment, stand_in=stand_in)
    backend = "native" if stage.name == "native tests" else "triton"
    which = "same_bits" if stage.name == "other triton tests" else "equals_reference"
    chosen = f"{which} and {backend} and cpu and bn_stats-rows"
    command = pytest(CONFORMANCE, "-n", "0", "-k", chosen)
    return replace(stage, command=command, environment=environment, stand_in=chosen)


def prepared(stages: list[Stage], out: Path, cache: Path) -> list[Stage]:
    """With the output folder in the commands, and what is common to all in the environments."""
    common = {**COMMON, "TRITON_CACHE_DIR": str(cache)}

    def of(stage: Stage) -> Stage:
        command = tuple(word.replace("{out}", str(out)) for word in stage.command)
        return replace(stage, command=command, environment={**common, **stage.environment})

    return [of(stage) for stage in stages]
