"""The Triton kernels without a GPU: what the compiler makes of them, and everything else without Triton.

What they compute is tested by the conformance suite, interpreted on the CPU.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import dfq_kernels
from dfq_kernels import dispatch
from dfq_kernels.dispatch import TABLE, written

ROOT = Path(__file__).parent.parent
REASON = dispatch.missing("fake_quant", "triton", "cpu")
triton_only = pytest.mark.skipif(REASON is not None, reason=str(REASON))
ARCHS = ("sm_80", "sm_90", "sm_100")
# instructions of a step of 64 bytes of K, of a 3x3 convolution behind a ReLU on sm_90; counted: 138, 207, 252
MOST_OF_A_STEP = {8: 145, 4: 215, 2: 260}


def in_fresh_process(*arguments: str, **environment: str) -> str:
    """What Python prints; Triton compiles there instead of interpreting."""
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**variables, **environment})
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.long
@triton_only
def test_every_kernel_compiles_for_every_architecture() -> None:
    rows = [json.loads(line) for line in in_fresh_process("-m", "tests.triton_compile", *ARCHS).splitlines()]
    for arch in ARCHS:
        assert {row["kernel"].split()[0] for row in rows if row["arch"] == arch} == {
            op for op in TABLE if written(op, "triton", "cuda")
        }
    for row in rows:
        assert (row["stack"], row["local"]) == (0, 0), f"{row['kernel']} on {row['arch']} keeps values in local memory"
        dense = row["kind"] == "convolution"
        assert row["registers"] <= (255 if dense else 128), row
        # the logarithm of the loss is a polynomial of the library's
        assert row["fused"] == 0 or row["kernel"].startswith("bn_stat_loss forward"), row
        assert row["vector_loads"] > 0 or row["kind"] == "finish", row
        if dense:  # int8 tensor cores; fields of bytes four at a time; x through asynchronous copies of 16 bytes
            assert row["products"] > 0, row
            bytes_as_they_are = "('W_BITS', 8)" in row["kernel"] and "('X_SIGNED', True)" in row["kernel"]
            assert row["four_at_once"] > 0 or bytes_as_they_are, row
            assert row["async_loads"] > 0 or "('KY', 1)" in row["kernel"] or "('INNER', 3)" in row["kernel"], row
    assert_steps_are_short([row for row in rows if row["arch"] == "sm_90"])


def assert_steps_are_short(rows: list[dict[str, Any]]) -> None:
    """A step of a padded convolution whose zero point is 0 has no instructions for padding."""
    found = {}
    for row in rows:
        settings = dict(re.findall(r"\('(\w+)', (\w+)\)", row["kernel"]))
        if (
            row["kind"] == "convolution"
            and settings["KY"] == "3"
            and settings["ZERO_PAD"] == "True"
            and settings["K"] == "64"
        ):
            found[int(settings["X_BITS"])] = row["step"]
    assert found.keys() == MOST_OF_A_STEP.keys()
    assert all(0 < found[bits] <= most for bits, most in MOST_OF_A_STEP.items()), found


def test_without_triton_everything_else_works(tmp_path: Path) -> None:
    """Triton's import fails in a fresh process: the operators run, and the support matrix says why it is not there."""
    (tmp_path / "triton.py").write_text("raise ImportError('no Triton here')\n")
    paths = f"{tmp_path}{os.pathsep}{ROOT}"
    script = (
        "import torch, dfq, dfq_kernels as k\n"
        "x = torch.randn(2, 3, 4, 4, requires_grad=True)\n"
        "k.fake_quant(x, 0.1, 0.0).sum().backward()\n"
        "print(k.dispatch.missing('fake_quant', 'triton', 'cpu'))\n"
    )
    text = in_fresh_process("-c", script, PYTHONPATH=paths, TRITON_INTERPRET="1")
    assert "Triton cannot be imported: no Triton here" in text


@triton_only
def test_infinities_are_what_the_reference_makes_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a lane that sees several values, in a stored variance, in a gradient."""
    from dfq_kernels import tiles

    monkeypatch.setattr(tiles, "PROGRAMS", 1)
    infinity, x = float("inf"), torch.randn(2, 2, 64, 64)
    x[0, 0, 0, 0], x[1, 1, 5, 5] = infinity, float("nan")
    found = [dfq_kernels.bn_stats(x, backend=backend)[0] for backend in ("triton", "reference")]
    assert torch.equal(found[0].isnan(), torch.tensor([False, True])) and found[0][0] == found[1][0] == infinity
    stored = torch.tensor([infinity, 1.0])
    outs = [
        dfq_kernels.bn_act_stats(torch.ones(3, 2, 2, 2), None, None, torch.zeros(2), stored, backend=backend)[0]
        for backend in ("triton", "reference")
    ]
    assert torch.equal(*outs)
    grads = []
    for backend in ("triton", "reference"):
        leaf = torch.randn(3, 2, 2, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
        mean, _ = dfq_kernels.bn_stats(leaf, backend=backend)
        grads += torch.autograd.grad(mean, leaf, torch.tensor([infinity, 1.0]))
    assert torch.equal(*grads)


@triton_only
@pytest.mark.parametrize(("layers", "launches"), [(1, 1), (48, 1), (49, 2)])
def test_all_layers_are_one_launch(monkeypatch: pytest.MonkeyPatch, layers: int, launches: int) -> None:
    from dfq_kernels.bn_stat_loss import triton as loss
    from dfq_kernels.fake_quant_weights import triton as weights

    seen: list[str] = []
    for module in (loss, weights):
        monkeypatch.setattr(module, "launch", lambda kernel, *_, **__: seen.append(kernel.fn.__name__))
    vectors, scalar = [torch.ones(8)] * layers, torch.ones(())
    weights.forward([torch.ones(4, 9)] * layers, [4] * layers, None)
    loss.forward(*[vectors] * 4, [1e-5] * layers)
    loss.backward(scalar, *[vectors] * 4, [1e-5] * layers)
    assert seen == [name for name in ("rows_kernel", "forward_kernel", "backward_kernel") for _ in range(launches)]


@triton_only
@pytest.mark.parametrize(("pixels", "channels"), [(1, 64), (49, 512), (64, 64), (1024, 16), (8192, 64), (10**6, 40)])
def test_small_maps_are_cut_until_the_chip_is_full(pixels: int, channels: int) -> None:
    """As finely as a product of tiles allows, or 16 channels of a pooled pixel; no pixel and no channel is left out."""
    from dfq_kernels.int_conv2d.triton import dense_blocks
    from dfq_kernels.integer_tiles import MULTIPROCESSORS, Ending, blocks
    from dfq_kernels.integers import Epilogue, Grid

    end = Ending(Epilogue(None, (Grid(1.0, 0, 0, 255),), (8,)), [torch.empty(1, dtype=torch.uint8)])
    convolution = dense_blocks(pixels, channels, 1, 1, 9 * channels, 1)
    pool, other = blocks(pixels, channels, end, 64), blocks(pixels, channels, end)
    for (programs, tile), finest in ((convolution, (16, 16)), (pool, (1, 16)), (other, None)):
        rows, columns = -(-pixels // tile["R"]), -(-channels // tile["B"])
        assert programs == rows * columns
        assert programs >= MULTIPROCESSORS or finest in (None, (tile["R"], tile["B"]))
        assert tile["R"] * tile["B"] * tile.get("T", 1) <= 8192
    assert convolution[1]["K"] % 32 == 0 and (16 + 16) * convolution[1]["K"] <= 12288


@triton_only
@pytest.mark.parametrize("elements", [32, 2048])
@pytest.mark.parametrize("shape", [(2, 3, 5), (70, 2, 41), (3, 70, 1), (9, 5, 130)])
def test_tiles_cover_every_element_once(shape: tuple[int, int, int], elements: int) -> None:
    """In plain arithmetic what the kernels' `tile` does, for both ways of cutting."""
    from dfq_kernels.tiles import Tiles

    outer, channels, inner = shape
    tiles = Tiles.of((outer * channels * inner, channels, inner), elements)
    seen = torch.zeros(outer * channels * inner, dtype=torch.int64)
    pieces = -(-inner // tiles.width)
    for unit in range(tiles.units):
        for slice in range(tiles.slices):
            steps = range(tiles.steps * slice // tiles.slices, tiles.steps * (slice + 1) // tiles.slices)
            for step in steps:
                if tiles.by_channel:
                    n = torch.arange(tiles.rows)[:, None] + step // pieces * tiles.rows
                    i = torch.arange(tiles.width)[None, :] + step % pieces * tiles.width
                    there, offsets = (n < outer) & (i < inner), (n * channels + unit) * inner + i
                else:
                    n = torch.arange(tiles.rows)[:, None] + step * tiles.rows
                    c = torch.arange(tiles.width)[None, :] + unit * tiles.width
                    there, offsets = (n < outer) & (c < channels), n * channels + c
                seen.index_put_((offsets[there],), torch.tensor(1), accumulate=True)
    assert bool((seen == 1).all())
