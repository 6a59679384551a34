"""`python -m tests.mutants`: applies every fault that the specs list to a copy, and expects the tests to notice."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from dfq_kernels.specs import all_specs

ROOT = Path(__file__).parent.parent
# references are built on one another: a fault may be in the file that the operator's own one imports
TESTS = ("tests/test_reference.py", "tests/test_integers.py", "tests/test_integer_functions.py")
FILES = [*(f"dfq_kernels/{op}/reference.py" for op in all_specs()), "dfq_kernels/int_pool/schema.py"]


def survives(folder: Path, op: str, old: str, new: str) -> bool:
    """Whether the tests pass with `old` replaced by `new` in the operator's reference."""
    names = [f"dfq_kernels/{op}/reference.py", *FILES]
    path = next((folder / name for name in names if old in (folder / name).read_text()), None)
    if path is None:
        raise SystemExit(f"{op}: no reference has the text {old!r} any more")
    original = path.read_text()
    path.write_text(original.replace(old, new, 1))
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *TESTS]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True)
    path.write_text(original)
    if done.returncode not in (0, 1):
        raise SystemExit(done.stdout.decode())
    return done.returncode == 0


def main() -> None:
    """Prints one line a mutation; exit code 1 if any survives."""
    survivors = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name in ("dfq", "dfq_kernels", "tests", "csrc"):
            shutil.copytree(ROOT / name, folder / name)
        for name in ("pyproject.toml", "setup.py"):
            shutil.copy(ROOT / name, folder)
        if not survives(folder, "fake_quant", "", ""):
            raise SystemExit("the tests must pass on the unchanged copy")
        for op, spec in all_specs().items():
            for old, new in spec.mutations:
                alive = survives(folder, op, old, new)
                survivors += alive
                print(f"{'SURVIVES' if alive else 'killed  '} {op}: {old!r} -> {new!r}", flush=True)
    print(f"{survivors} survive")
    raise SystemExit(1 if survivors else 0)


if __name__ == "__main__":
    main()
