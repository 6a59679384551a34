"""A float student from nothing by CMI's implementation of the same paper (`--method dfq`), on this package's teacher.

It is the public code that such numbers are mostly compared with. It runs as it is, with its own script's settings for
WRN pairs (rate 0.1, one generator step to ten student steps, adversary 1, BN 1, one-hot 1, balance 20), but for what a
data set of grey images asks for: one channel, this teacher and student, as many student images as ours.

    git clone https://github.com/zju-vipa/CMI
    pip install torchvision matplotlib scikit-learn einops termcolor kornia tqdm
    python examples/against_cmi.py CMI [--steps 3000] [--seed 0] [--threads N] [--json FILE]
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from measure import write
from torch import Tensor, nn

from dfq.api import seeded_model
from dfq.data.images import load_images
from dfq.models.embedded import SPEC, load_teacher
from dfq.results.evaluate import accuracy

EPOCHS, BATCH = 10, 128
NAME = "fashion"


class Teacher(nn.Module):
    """Gives its features too, where it is asked for them, as that code's networks do."""

    def __init__(self) -> None:
        super().__init__()
        self.network = load_teacher()

    def forward(self, x: Tensor, return_features: bool = False) -> Any:
        found: list[Tensor] = []
        hook = self.network.fc.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))  # type: ignore[union-attr]
        logits = self.network(x)
        hook.remove()
        return (logits, found[0]) if return_features else logits


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("code", type=Path, help="a checkout of zju-vipa/CMI")
    parser.add_argument("--steps", type=int, default=3000, help="student steps of 128 images, a multiple of 100")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    path = None if arguments.json is None else arguments.json.absolute()
    sys.path.insert(0, str(arguments.code.absolute()))
    moved = ModuleType("torchvision.models.utils")  # it was there when that code was written
    moved.load_state_dict_from_url = torch.hub.load_state_dict_from_url  # type: ignore[attr-defined]
    sys.modules[moved.__name__] = moved
    import datafree
    import datafree_kd
    import registry

    test = load_images("fashion-mnist", "test")
    normalised = torch.utils.data.TensorDataset(test.normalize(test.pixels), test.labels)
    teacher, student = Teacher(), seeded_model(SPEC, arguments.seed, 0)
    registry.NORMALIZE_DICT[NAME] = {"mean": test.mean, "std": test.std}
    registry.get_dataset = lambda **_: (10, normalised, normalised)
    registry.get_model = lambda name, **_: teacher if name == "teacher" else student
    make = datafree.models.generator.LargeGenerator.__init__
    grey = functools.partialmethod(lambda self, nc, **sizes: make(self, nc=1, **sizes))  # it asks for three channels
    datafree.models.generator.LargeGenerator.__init__ = grey
    datafree_kd.parser.set_defaults(gpu=None)  # else it asks for a GPU
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        Path("checkpoints/pretrained").mkdir(parents=True)
        torch.save({"state_dict": teacher.state_dict()}, f"checkpoints/pretrained/{NAME}_teacher.pth")
        sys.argv = [
            "datafree_kd.py", "--method", "dfq", "--dataset", NAME, "--teacher", "teacher", "--student", "student",
            "--batch_size", str(BATCH), "--lr", "0.1", "--epochs", str(EPOCHS), "--kd_steps", "10",
            "--ep_steps", str(arguments.steps // EPOCHS), "--g_steps", "1", "--lr_g", "1e-3", "--adv", "1", "--T", "20",
            "--bn", "1", "--oh", "1", "--act", "0", "--balance", "20", "--seed", str(arguments.seed), "-j", "0",
        ]  # fmt: skip
        datafree_kd.main()
        os.chdir("/")
    seconds = round(time.monotonic() - began, 1)
    found = accuracy(student, test, device=torch.device("cpu"))
    print(f"{arguments.steps} steps of {BATCH} images, seed {arguments.seed}: {found:.2f} % in {seconds} s")
    if path is not None:
        row = {"code": "zju-vipa/CMI --method dfq", "steps": arguments.steps, "batch": BATCH, "seed": arguments.seed,
               "accuracy": found, "seconds": seconds, "threads": torch.get_num_threads()}  # fmt: skip
        write(path, [row])


if __name__ == "__main__":
    main()
