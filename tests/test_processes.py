"""One network trained by two processes: the same result as by one, up to the order of sums, and the same in both."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dfq
from dfq.running.checkpoint import load_tree
from tests.conftest import SMALL_RECIPE, small_net
from tests.test_heads import UNLABELLED, Boxes, taught

ROOT = Path(__file__).parent.parent
COMMON = {"input_shape": (1, 12, 12), "precision": "fp32", "preset": "W3A3"}
RUNS = {
    "whole": lambda out, **more: dfq.quantize(
        small_net(), recipe=SMALL_RECIPE, steps=4, average_bits=5.0, out=out, **COMMON, **more
    ),
    "boxes": lambda out, **more: dfq.quantize(
        taught(Boxes), recipe=UNLABELLED, steps=3, objective=["values", "classes"], out=out, **COMMON, **more
    ),
}
SCRIPT = """
import os, sys
from pathlib import Path
import torch
import dfq
from dfq.running import ranks
from tests.conftest import small_net
from tests.test_heads import UNLABELLED
from tests.test_processes import RUNS

folder, what = Path(sys.argv[1]), sys.argv[2]

class Stop:
    def on_step(self, phase, index, total, metrics):
        if what == "stop" and phase == "reconstruct" and ranks.rank() == 1:  # one of both hears it
            os.kill(os.getpid(), 15)

def save(where, result):
    torch.save(result.model.state_dict(), where / f"{ranks.rank()}.pt")
    (where / f"sizes{ranks.rank()}").write_text(str(sorted(result.sizes)))

torch.set_num_threads(1)
with ranks.joined("cpu"):
    if what == "all":  # one start for several runs
        try:
            dfq.distill(small_net(), [small_net()], input_shape=(1, 12, 12), recipe=UNLABELLED, out=folder / "float")
        except ValueError as error:
            (folder / f"refused{ranks.rank()}").write_text(str(error))
        for name, run in RUNS.items():
            save(folder / name, run(folder / name / "run"))
    else:
        save(folder, RUNS["whole"](folder / "run", observer=Stop(), resume=what == "resume"))
os._exit(0)  # gloo's own threads have aborted a process that was ending
"""


def start(folder: Path, what: str) -> subprocess.CompletedProcess:
    """Two processes."""
    script = folder / "script.py"
    script.write_text(SCRIPT)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    environment |= {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [sys.executable, *launch, str(script), str(folder), what], env=environment, cwd=ROOT, capture_output=True,
        text=True, timeout=300,
    )  # fmt: skip


def states(folder: Path) -> list[dict[str, torch.Tensor]]:
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whole runs of two processes, each in a folder of its name."""
    folder = tmp_path_factory.mktemp("together")
    for what in RUNS:
        (folder / what).mkdir()
    done = start(folder, "all")
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("what", RUNS)
def test_two_processes_train_what_one_trains(what: str, together: Path, tmp_path: Path) -> None:
    folder = together / what
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as each of the two: a sum in another order may round a weight to its neighbour
    try:
        alone = RUNS[what](tmp_path / "run").model.state_dict()
    finally:
        torch.set_num_threads(threads)
    first, second = states(folder)
    assert all(torch.equal(value, second[name]) for name, value in first.items())  # ranges, too
    for name, value in alone.items():
        torch.testing.assert_close(first[name], value, rtol=2e-3, atol=2e-3, msg=name)
    files = [place / "run" / "metrics.jsonl" for place in (tmp_path, folder)]
    metrics = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
    assert len(metrics[0]) == len(metrics[1])
    for one, two in zip(*metrics, strict=True):
        assert one.keys() == two.keys()
        assert all(one[name] == pytest.approx(two[name], rel=2e-2, abs=2e-3) for name in one if "/" in name), (one, two)
    assert (folder / "sizes1").read_text() == "[]"  # the first process judges and writes
    assert "integers" in (folder / "sizes0").read_text()


def test_float_students_are_refused_in_two_processes(together: Path) -> None:
    rule = "the number of processes must be one, for networks whose batch norms learn from whole batches, got 2"
    assert all((together / f"refused{rank}").read_text() == f"distill: {rule}" for rank in range(2))
    assert not (together / "float").exists()


def test_a_signal_to_one_process_stops_both_and_they_resume(together: Path, tmp_path: Path) -> None:
    stopped = start(tmp_path, "stop")
    assert stopped.returncode != 0 and "Interrupted: interrupted after step" in stopped.stderr, stopped.stderr[-3000:]
    assert load_tree(tmp_path / "run" / "checkpoint.safetensors")["next_step"] > 5
    resumed = start(tmp_path, "resume")
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    for one, other in zip(states(together / "whole"), states(tmp_path), strict=True):
        assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_the_command_line_in_two_processes(tmp_path: Path) -> None:
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "dfq", "quantize",
        "--model", "tests.conftest:small_net", "--input-shape", "1,12,12", "--recipe", "paper", "--steps", "2",
        "--out", str(tmp_path / "run"), "--json", "--device", "cpu",
    ]  # fmt: skip
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = done.stdout.strip().splitlines()  # one process prints
    assert json.loads(line)["out"] == str(tmp_path / "run")
