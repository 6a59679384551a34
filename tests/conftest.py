"""What several test files use: the seed that is printed, small networks, small runs."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton: kernels run on CPU tensors
os.environ.setdefault(
    "THP_MEM_ALLOC_ENABLE", "1"
)  # large pages for large tensors: a third of the time of 2^31 elements

import pytest
import torch
from torch import nn

import dfq
from dfq.config import RUNGS, GeneratorConfig, LayerFit, Recipe
from dfq.engine.run import missing
from tests.gpu_settings import exact_gpu  # noqa: F401  for every test
from tests.skips import pytest_runtest_logreport, pytest_sessionfinish, pytest_terminal_summary  # noqa: F401

SEED = int(os.environ.get("DFQ_TEST_SEED", "20260101"))


def pytest_report_header() -> str:
    return f"random inputs: DFQ_TEST_SEED={SEED}, torch {torch.__version__}, {torch.get_num_threads()} threads"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="torch sees no CUDA device"))


@pytest.fixture
def random() -> torch.Generator:
    torch.manual_seed(SEED)
    return torch.Generator().manual_seed(SEED)


@pytest.fixture
def poison() -> Iterator[None]:
    """Memory that nobody wrote reads as NaN (or the largest integer), so that an output left unwritten shows."""
    torch.use_deterministic_algorithms(True)  # torch.empty is filled while this is on
    assert torch.utils.deterministic.fill_uninitialized_memory and bool(torch.empty(3).isnan().all())
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The native module with emulated CUDA kernels and AMX tiles; several processes of tests build one."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ to build the emulation with")
    from tests.emulated import build

    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "emulator"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return build(folder)


class SmallNet(nn.Module):
    """Stem, a residual block with a strided shortcut, pooling, a head: every kind of value that prepare() meets."""

    def __init__(self, in_channels: int = 1, num_classes: int = 4) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(in_channels, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
        self.conv3, self.bn3 = nn.Conv2d(8, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8)
        self.shortcut = nn.Conv2d(8, 8, 1, 2, bias=True)
        self.relu, self.pool, self.fc = nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Linear(8, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        out = self.bn3(self.conv3(self.relu(self.bn2(self.conv2(x)))))
        return self.fc(self.pool(self.relu(out + self.shortcut(x))).flatten(1))


def small_net(**sizes: int) -> SmallNet:
    """A factory for the tests of `package.module:factory`, and a net with statistics that are not the defaults."""
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        net = SmallNet(**sizes)
        net.train()
        with torch.no_grad():
            for _ in range(5):
                net(torch.randn(32, net.conv1.in_channels, 12, 12))
    return net.eval()


SMALL_RECIPE = Recipe(
    "small",
    (GeneratorConfig(live=True, snapshots=(0.5,)), GeneratorConfig(conditional=True, snapshots=(1.0,))),
    warm_up=3, batch_size=8, noise=8, width=8, calibration_batches=2, students=2, student_steps_per_generator_step=2,
    ranges="lsq", rungs=RUNGS, fit=LayerFit(images=16, steps=2, batch_size=4), momentum=0.5, mirrored=True,
)  # fmt: skip


@pytest.fixture
def run_small(tmp_path: Path):
    """Quantizes the small net; keywords go to `dfq.quantize`."""
    return partial(small_run, tmp_path / "run")


def small_run(folder: Path, **keywords):
    settings = {
        "input_shape": (1, 12, 12),
        "num_classes": 4,
        "preset": "W3A3",
        "recipe": SMALL_RECIPE,
        "steps": 4,
        "out": folder,
        "precision": "fp32",
    }
    settings |= keywords
    return dfq.quantize(settings.pop("model", None) or small_net(), **settings)


@pytest.fixture
def wide_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    widen_tiles(monkeypatch)


def widen_tiles(patch: pytest.MonkeyPatch, pixels: int = 1024, channels: int = 512, elements: int = 2**18) -> None:
    """Triton's interpreter is fastest with few programs of large tiles; a GPU takes its own."""
    if torch.cuda.is_available() or missing("triton", torch.device("cpu")) is not None:
        return
    from dfq_kernels import integer_tiles, tiles
    from dfq_kernels.int_conv2d import triton as convolution

    for module in (convolution, integer_tiles):
        patch.setattr(module, "MULTIPROCESSORS", 1)
    convolve = {"pixels": pixels, "channels": channels, "depth": channels}
    wide = {"convolution": convolve, "pixels": {"elements": elements}}
    for kind, sides in wide.items():
        for side, size in sides.items():
            patch.setitem(tiles.tuning()[kind], side, size)
