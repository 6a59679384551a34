"""The engine in other processes: forked, pickled, and what importing it brings along."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dfq import engine
from dfq.engine.run import missing
from tests.engine_graphs import residual_network
from tests.integer_networks import exported, input_shape

# with two threads in the parent, whose team is there before the fork
FORKS = """
import multiprocessing, os, sys, torch
from dfq import engine
torch.set_num_threads(2)
network = engine.load(sys.argv[1])
images = torch.randn(4, *network.graph.input_shape, generator=torch.Generator().manual_seed(0))
wanted = network(images)
def work():
    os._exit(0 if torch.equal(network(images), wanted) and torch.equal(network(images[:1]), wanted[:1]) else 3)
workers = [multiprocessing.get_context("fork").Process(target=work) for _ in range(3)]
for worker in workers: worker.start()
for worker in workers: worker.join(30)
codes = [worker.exitcode for worker in workers]
for worker in workers: worker.kill()
again = torch.equal(network(images), wanted)
print(codes, again)
sys.exit(codes != [0, 0, 0] or not again)
"""


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    graph = residual_network((1, 32, 32))
    path = tmp_path_factory.mktemp("network") / "net.safetensors"
    engine.save_graph(graph, path)
    return path


def test_forked_workers_run_the_network_that_their_parent_loaded(network: Path) -> None:
    done = subprocess.run([sys.executable, "-c", FORKS, str(network)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def _logits(loaded: engine.Engine, images: torch.Tensor) -> torch.Tensor:
    return loaded(images)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_an_engine_is_pickled(network: Path, backend: str) -> None:
    """Into another process, which is how a pool gets it."""
    if (reason := missing(backend, torch.device("cpu"))) is not None:
        pytest.skip(reason)
    loaded = engine.load(network, backend=backend)
    images = torch.randn(2, *loaded.graph.input_shape)
    again = pickle.loads(pickle.dumps(loaded))
    assert again.backend == backend and torch.equal(again(images), loaded(images))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert torch.equal(pool.apply(_logits, (loaded, images)), loaded(images))


@pytest.mark.skipif(missing("native", torch.device("cpu")) is not None, reason="no native kernels")
def test_two_threads_beside_other_processes_do_not_wait_for_whole_slices() -> None:
    """A thread that gives up its core while it waits for the other gets it back milliseconds later.

    The network was 7 to 100 times as slow as on one thread."""
    loaded, images = engine.Engine(exported("mobilenet-v2", "W8A8")[1]), torch.randn(1, *input_shape("mobilenet-v2"))
    busy = [sys.executable, "-c", "import os\nos.nice(10)\nwhile True: pass"]
    others = [subprocess.Popen(busy) for _ in range(os.cpu_count() or 1)]
    threads, ratios = torch.get_num_threads(), []
    try:
        for _ in range(3):
            one, two = (median_seconds(loaded, images, count) for count in (1, min(2, os.cpu_count() or 1)))
            ratios.append(two / one)
    finally:
        torch.set_num_threads(threads)
        for other in others:
            other.kill()
    assert min(ratios) < 3, ratios


def median_seconds(loaded: engine.Engine, images: torch.Tensor, threads: int) -> float:
    torch.set_num_threads(threads)
    times = []
    for _ in range(60):
        began = time.perf_counter()
        loaded(images)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


@pytest.mark.parametrize("module", ["dfq.engine", "dfq"])
def test_who_runs_integers_loads_neither_trainer_nor_pictures(module: str) -> None:
    program = (
        f"import sys, {module}; print(sorted({{name.partition('.')[0] for name in sys.modules}}), list(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True,
                          env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)})  # fmt: skip
    for unwanted in (
        "matplotlib",
        "tensorboard",
        "torch.utils.tensorboard",
        "PIL",
        "typer",
        "dfq.method.trainer",
        "dfq.api",
    ):
        assert f"'{unwanted}'" not in done.stdout, unwanted
