"""What becomes of other people's networks: `python -m benchmarks.zoo --out FILE [--part I/N] [NAME ...]`.

NAME is `tv/resnet18` (torchvision) or `timm/resnet50d`; without one, all of `results/zoo.json`: the classifiers and
segmenters of torchvision, and one or two members of each family of timm, as far as they have batch norms and
torch.export captures them. Weights are random, batch norms have seen noise, images are small where a network allows it.
One line of JSON a network is appended to FILE; networks that are there already are left out.

    prepare, train, calibrate   done; all gradients are finite
    engine                      the logits equal the student's, bit for bit; or what keeps it from integers
    onnx_off, onnx              the norm of the difference in ONNX Runtime, relative to the student's; within 5 %
"""

from __future__ import annotations

import argparse
import json
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import dfq
from benchmarks.machine import RESULTS
from dfq.errors import first_line
from dfq.quant import prepared_of

SIDES = (96, 224, 256)  # of the images, the smallest that a network takes
FLOAT_PART = "floating-point part"
CLOSE = 0.05


def build(name: str) -> tuple[nn.Module, int]:
    """The network with random weights, and the side of images that it was made for (0: any)."""
    source, _, model = name.partition("/")
    if source == "tv":
        from torchvision import models

        backbone = {"weights_backbone": None} if model.startswith(("deeplab", "fcn", "lraspp")) else {}
        return models.get_model(model, weights=None, **backbone), 299 if "inception" in model else 0
    import timm

    network = timm.create_model(model, pretrained=False)
    config = network.default_cfg
    fixed = config.get("fixed_input_size") or not config.get("pool_size")
    return network, config["input_size"][-1] if fixed else 0


def seen_noise(network: nn.Module, side: int) -> int:
    """Sets the batch norms' statistics; the side of the images that the network took."""
    for size in (side or SIDES[0], *SIDES[1:]):
        try:
            network.train()
            with torch.no_grad():
                for _ in range(2):
                    network(torch.randn(4, 3, size, size))
        except Exception:  # whatever a network raises for images that are too small
            if size == SIDES[-1]:
                raise
        else:
            network.eval()
            return size
    raise AssertionError(side)


def first(value: Any) -> Tensor:
    """The first tensor of what a network returns."""
    tensor: Tensor = pytree.tree_leaves(value)[0]
    return tensor


def check(name: str, preset: str) -> dict[str, Any]:
    """One row; a stage that raises holds the first line of its error, and is the last."""
    row: dict[str, Any] = {"network": name, "preset": preset}
    stage = "prepare"
    try:
        torch.manual_seed(0)
        network, side = build(name)
        side = seen_noise(network, side)
        images = torch.randn(2, 3, side, side)
        row |= {"parameters": sum(parameter.numel() for parameter in network.parameters()), "side": side}
        student = dfq.prepare(network, (3, side, side), preset=preset)
        row[stage], stage = True, "train"
        first(student.train()(images)).float().square().mean().backward()
        grads = [parameter.grad for parameter in student.parameters() if parameter.grad is not None]
        row[stage], stage = bool(grads) and all(bool(grad.isfinite().all()) for grad in grads), "calibrate"
        dfq.calibrate(student, [torch.randn(4, 3, side, side)])
        with torch.no_grad():
            expected = first(student.eval()(images))
        row[stage], stage = True, "engine"
        floats = bool(prepared_of(student).floats)
        row[stage] = FLOAT_PART if floats else torch.equal(first(dfq.export_integers(student)(images)), expected)
        stage = "onnx"
        row["onnx_off"] = float((in_onnx(student, images) - expected).norm() / expected.norm())
        row[stage] = row["onnx_off"] <= CLOSE
    except Exception as error:  # what this project or the network raises is what is looked for
        row[stage] = f"{type(error).__name__}: {first_line(error)[:300]}"
    return row


def in_onnx(student: Any, images: Tensor) -> Tensor:
    """The first output of ONNX Runtime."""
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "network.onnx")
        dfq.export_onnx(student, path)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: images.numpy()})[0])


def late(*_: object) -> None:
    raise TimeoutError("it took too long")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("networks", nargs="*", help="default: all of results/zoo.json")
    parser.add_argument("--out", type=Path, required=True, help="a file of one JSON line a network")
    parser.add_argument("--part", default="0/1", help="I/N: every Nth network, from the Ith")
    parser.add_argument("--preset", default="W8A8")
    parser.add_argument("--seconds", type=int, default=600, help="at most, for one network")
    arguments = parser.parse_args()
    index, parts = map(int, arguments.part.split("/"))
    known = [row["network"] for row in json.loads((RESULTS / "zoo.json").read_text())["rows"]]
    rows = [json.loads(line) for line in arguments.out.read_text().splitlines()] if arguments.out.exists() else []
    done = {(row["network"], row["preset"]) for row in rows}
    signal.signal(signal.SIGALRM, late)
    for name in arguments.networks or known[index::parts]:
        if (name, arguments.preset) in done:
            continue
        began = time.monotonic()
        signal.alarm(arguments.seconds)
        row = check(name, arguments.preset)
        signal.alarm(0)
        row["seconds"] = round(time.monotonic() - began, 1)
        with arguments.out.open("a") as file:
            print(json.dumps(row), file=file)
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
