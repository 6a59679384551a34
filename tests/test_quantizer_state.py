"""A quantizer: its bits and phase in its state, what it has seen, any magnitude, several processes."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import pytest
import torch
from torch import distributed as dist
from torch import multiprocessing as mp
from torch import nn

import dfq
from dfq.config import quant_config
from dfq.export import ExportError, export
from dfq.layers import Tail
from dfq.quant import freeze_ranges, learn_ranges, prepare, set_adapting
from dfq.quant.quantizers import FIXED, LEARNED, ActivationQuantizer
from tests.conftest import SEED, small_net
from tests.test_quant import calibrated

LSQ = {"ranges": "lsq"}


def test_a_state_puts_a_fresh_network_into_its_phase() -> None:
    x = torch.randn(16, 1, 12, 12)
    config = quant_config("W2A4", **LSQ)
    student = calibrated(small_net(), config, x)
    for phase in (LEARNED, FIXED):
        fresh = prepare(small_net(), (1, 12, 12), config)
        fresh.load_state_dict(student.state_dict())
        found = {
            module.source for module in fresh.modules() if isinstance(module, ActivationQuantizer) and module.bits < 8
        }
        assert found == {phase}
        assert dict(fresh.named_parameters()).keys() == dict(student.named_parameters()).keys()
        assert torch.equal(fresh.eval()(x), student.eval()(x))
        assert torch.equal(fresh.train()(x), student.train()(x))
        freeze_ranges(student)


@pytest.mark.parametrize(("saved", "loaded"), [("W8A8", "W4A4"), ("W4A4", "W4A8"), ("W4A4", "W3A4")])
def test_a_state_of_other_bits_is_refused(saved: str, loaded: str) -> None:
    state = calibrated(small_net(), quant_config(saved), torch.randn(4, 1, 12, 12)).state_dict()
    with pytest.raises(RuntimeError, match=r"grid must be of the integers \[-?\d+, \d+\], got \[-?\d+, \d+\]"):
        prepare(small_net(), (1, 12, 12), quant_config(loaded)).load_state_dict(state)


@pytest.mark.parametrize("seen", ["nothing", "in evaluation", "NaN", "infinity"])
def test_a_network_that_saw_no_finite_image_is_not_frozen_learned_or_exported(seen: str) -> None:
    student = prepare(small_net(), (1, 12, 12), quant_config("W4A4", **LSQ)).train(seen != "in evaluation")
    images = torch.randn(4, 1, 12, 12)
    if seen != "nothing":
        set_adapting(student, True)
        student(images * {"NaN": float("nan"), "infinity": float("inf")}.get(seen, 1.0))
        set_adapting(student, False)
    for call in (freeze_ranges, lambda model: learn_ranges(model, quant_config("W4A4", **LSQ))):
        with pytest.raises(ValueError, match="model must have seen finite images in training mode"):
            call(student)
    with pytest.raises(ExportError, match="must have fixed ranges"):
        export(student.eval())


def test_ranges_that_move_or_are_learned_are_not_exported() -> None:
    """The integer network would have another scale than the student's own evaluation."""
    student = dfq.prepare(small_net(), (1, 12, 12), config=quant_config("W4A4", **LSQ))
    images = torch.randn(4, 1, 12, 12)
    student(images)
    with pytest.raises(ExportError, match="must have fixed ranges .dfq.calibrate, .*got a moving one of conv1"):
        dfq.export_integers(student)
    learn_ranges(student, quant_config("W4A4", **LSQ))
    with pytest.raises(ExportError, match="must have fixed ranges .*got a (moving|learned) one of"):
        dfq.export_integers(student)
    freeze_ranges(student)
    with torch.no_grad():
        assert torch.equal(dfq.export_integers(student)(images), student.eval()(images))


@pytest.mark.parametrize("factor", [1e-9, 1e-5, 1e5, 1e9])
@pytest.mark.parametrize("what", ["images", "last layer"])
def test_the_magnitude_of_images_and_layers_does_not_matter(factor: float, what: str) -> None:
    """Without batch norms, whose eps is absolute, a network of ReLUs is homogeneous."""
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3, bias=False), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4, bias=False)
    )
    x = torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(SEED))
    plain = calibrated(copy.deepcopy(net), quant_config("W8A8"), x).eval()(x)
    if what == "images":
        x = x * factor
    else:
        with torch.no_grad():
            net[4].weight.mul_(factor)
    found = calibrated(net, quant_config("W8A8"), x).eval()(x)
    torch.testing.assert_close(found / factor, plain, rtol=0, atol=0.02 * float(plain.std()))


@pytest.mark.parametrize("momentum", [0.1, 0.3, None])
@pytest.mark.parametrize("quantized", [True, False])
def test_a_trained_batch_norm_moves_as_torch_s(momentum: float | None, quantized: bool) -> None:
    norm, theirs = (nn.BatchNorm2d(3, momentum=momentum) for _ in range(2))
    quantizer = ActivationQuantizer(8, signed=False, averaging_constant=0.1) if quantized else None
    tail = Tail(norm, "relu", quantizer, train_batch_norm=True).train()
    for step in range(4):
        set_adapting(tail, step != 2)
        x = torch.randn(8, 3, 5, 5) * (step + 1) + step
        tail(x)
        if step != 2:
            theirs.train()(x)
    assert int(norm.num_batches_tracked) == 3
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(getattr(norm, name), getattr(theirs, name), msg=name)


def _train(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.manual_seed(0)
    student = prepare(small_net(), (1, 12, 12), quant_config("W8A8")).train()
    model = nn.parallel.DistributedDataParallel(student)
    set_adapting(student, True)
    for step in range(3):
        images = torch.randn(8, 1, 12, 12, generator=torch.Generator().manual_seed(10 * step + rank)) * (1 + 3 * rank)
        if step == 1 and rank == 1:
            images[0, 0, 0, 0] = float("nan")
        model(images).nan_to_num().sum().backward()
    torch.save(student.state_dict(), f"{folder}/{rank}.pt")
    dist.barrier()
    os._exit(0)  # gloo's own threads have aborted a process that was ending ("terminate called without an exception")


def test_two_processes_end_with_the_same_ranges_which_are_those_of_all_images(tmp_path: Path) -> None:
    mp.spawn(_train, (str(tmp_path),), nprocs=2)
    states = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    ranges = [name for name in states[0] if name.endswith(("running_min", "running_max", "scale", "zero_point"))]
    assert len(ranges) > 10 and all(torch.equal(states[0][name], states[1][name]) for name in ranges)
    image = "quantizers.x_8.running_max"  # of the first and the third batch: the second one had a NaN
    batches = [torch.stack([torch.randn(8, 1, 12, 12, generator=torch.Generator().manual_seed(10 * step + rank)).max()
                            * (1 + 3 * rank) for rank in range(2)]).max() for step in (0, 2)]  # fmt: skip
    torch.testing.assert_close(states[0][image], batches[0] + 0.1 * (batches[1] - batches[0]))
