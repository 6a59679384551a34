"""Every integer of WRN-16-1 on all 10,000 test images: `python -m tests.whole_test_set native [W4A4 ...]`; minutes.

The engine's values against those of the trained graph's exact forward; any difference ends it. `triton` on a GPU where
there is one, else interpreted (half an hour a preset). Without a preset: all of them.
"""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

from dfq.data.images import load_images
from dfq.engine import IntegerGraph
from dfq.engine.native import NativeNetwork
from dfq.engine.operators import OperatorNetwork
from dfq.running.execution import Execution
from tests.conftest import widen_tiles
from tests.integer_networks import PRESETS, exact_values, exported

BATCH = 250


def values_of(graph: IntegerGraph, backend: str, images: Tensor) -> dict[str, Tensor]:
    """Every value by a backend of the engine."""
    if backend == "native":
        network = NativeNetwork(graph, keep=True)
        each = [network.values(image[None]) for image in images]
        return {name: torch.cat([one[name] for one in each]) for name in each[0]}
    device = torch.device("cuda" if backend == "triton" and torch.cuda.is_available() else "cpu")
    found = OperatorNetwork(graph, device, backend, Execution("off", device)).values(images.to(device))
    return {name: value.cpu() for name, value in found.items()}


def main() -> None:
    presets = [name for name in sys.argv[1:] if name in PRESETS] or PRESETS
    backends = [name for name in sys.argv[1:] if name not in PRESETS] or ["native"]
    test = load_images("fashion-mnist", "test")
    widen_tiles(pytest.MonkeyPatch(), pixels=8192, channels=128, elements=2**20)
    for preset in presets:
        model, graph = exported("wrn-16-1", preset)
        count = 0
        for start in range(0, len(test), BATCH):
            images = test.normalize(test.pixels[start : start + BATCH])
            expected = exact_values(model, graph, images)
            for backend in backends:
                found = values_of(graph, backend, images)
                assert found.keys() == expected.keys()
                for name, value in found.items():
                    same = torch.equal(value.flatten(), expected[name].flatten())
                    assert same, f"{preset} {backend}: {name} differs in images {start} to {start + BATCH - 1}"
                    count += value.numel()
        print(f"{preset}: {count:,} values of {len(test):,} images are equal ({', '.join(backends)})", flush=True)


if __name__ == "__main__":
    main()
