"""One network trained by two processes: the same result as by one, up to the order of sums, and the same in both."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dfq.running.checkpoint import load_tree

ROOT = Path(__file__).parent.parent
SCRIPT = """
import os, sys
from pathlib import Path
import torch
import dfq
from dfq.config import LayerBits
from dfq.running import ranks
from tests.conftest import SMALL_RECIPE, small_net
from tests.test_heads import UNLABELLED, Boxes, taught

folder, what = Path(sys.argv[1]), sys.argv[2]

class Stop:
    def on_step(self, phase, index, total, metrics):
        if what == "stop" and phase == "reconstruct" and ranks.rank() == 1:  # one of both hears it
            os.kill(os.getpid(), 15)

torch.set_num_threads(1)
with ranks.joined("cpu"):
    common = {"input_shape": (1, 12, 12), "precision": "fp32", "out": folder / "run", "preset": "W3A3"}
    if what == "boxes":
        result = dfq.quantize(taught(Boxes), recipe=UNLABELLED, steps=3, objective=["values", "classes"], **common)
    elif what == "distill":
        result = dfq.distill(small_net(), [small_net()], input_shape=(1, 12, 12), recipe=UNLABELLED, out=folder / "run")
    else:
        result = dfq.quantize(
            small_net(), recipe=SMALL_RECIPE, steps=4, average_bits=5.0, resume=what == "resume", observer=Stop(),
            **common,
        )
    torch.save(result.model.state_dict(), folder / f"{ranks.rank()}.pt")
    (folder / f"accuracies{ranks.rank()}").write_text(str(sorted(result.sizes)))
os._exit(0)  # gloo's own threads have aborted a process that was ending
"""


def start(folder: Path, what: str, processes: int) -> subprocess.CompletedProcess:
    folder.mkdir(exist_ok=True)
    script = folder / "script.py"
    script.write_text(SCRIPT)
    launch = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    environment |= {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *launch, str(script), str(folder), what], env=environment, cwd=ROOT, capture_output=True,
        text=True, timeout=300,
    )  # fmt: skip


def states(folder: Path, processes: int) -> list[dict[str, torch.Tensor]]:
    return [torch.load(folder / f"{rank}.pt") for rank in range(processes)]


@pytest.mark.parametrize("what", ["whole", "boxes"])
def test_two_processes_train_what_one_trains(what: str, tmp_path: Path) -> None:
    done = [start(tmp_path / str(count), what, count) for count in (1, 2)]
    assert [item.returncode for item in done] == [0, 0], done[1].stderr[-3000:]
    (alone,), together = states(tmp_path / "1", 1), states(tmp_path / "2", 2)
    assert all(torch.equal(value, together[1][name]) for name, value in together[0].items())  # ranges, too
    for name, value in alone.items():
        torch.testing.assert_close(together[0][name], value, rtol=2e-3, atol=2e-3, msg=name)
    metrics = [
        [json.loads(line) for line in (tmp_path / count / "run" / "metrics.jsonl").read_text().splitlines()]
        for count in "12"
    ]
    assert len(metrics[0]) == len(metrics[1])
    for one, two in zip(*metrics, strict=True):
        assert one.keys() == two.keys()
        assert all(one[name] == pytest.approx(two[name], rel=2e-2, abs=2e-3) for name in one if "/" in name), (one, two)
    assert (tmp_path / "2" / "accuracies1").read_text() == "[]"  # the first process judges and writes
    assert "integers" in (tmp_path / "2" / "accuracies0").read_text()


def test_a_signal_to_one_process_stops_both_and_they_resume(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert start(whole, "whole", 2).returncode == 0
    stopped = start(cut, "stop", 2)
    assert stopped.returncode != 0 and "Interrupted: interrupted after step" in stopped.stderr, stopped.stderr[-3000:]
    assert load_tree(cut / "run" / "checkpoint.safetensors")["next_step"] > 5
    resumed = start(cut, "resume", 2)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    for one, other in zip(states(whole, 2), states(cut, 2), strict=True):
        assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_float_students_are_refused_in_two_processes(tmp_path: Path) -> None:
    done = start(tmp_path / "run", "distill", 2)
    rule = (
        "distill: the number of processes must be one, for networks whose batch norms learn from whole batches, got 2"
    )
    assert done.returncode != 0 and rule in done.stderr


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
