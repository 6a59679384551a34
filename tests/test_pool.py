"""The pool deals the same images whenever it is asked, and makes each only once."""

from __future__ import annotations

from dataclasses import replace

import torch

from dfq.method.generator import Generator
from dfq.method.pool import ImagePool
from dfq.running.execution import Execution
from tests.conftest import SMALL_RECIPE
from tests.test_trainer import task, to_live_step


def test_each_purpose_keeps_its_round() -> None:
    """Two students that take turns do not make the other's images again."""
    device = torch.device("cpu")
    pool = ImagePool(Execution("off", device), batch_size=4, seed=0, device=device, precision="fp32")
    pool.frozen = [Generator((1, 8, 8), noise=8, width=8) for _ in range(3)]
    calls = []
    for member in pool.frozen:
        member.register_forward_hook(lambda *_: calls.append(1))
    for step in range(6):
        for student in range(2):
            pool.batch(f"student{student}", step)
    assert len(calls) == 2 * 2 * 3  # students, rounds, members


def test_the_average_follows_the_live_generator_and_makes_half_of_its_images() -> None:
    work = task(replace(SMALL_RECIPE, mirrored=False))
    source = work.sources[0]
    first = to_live_step(work)
    assert work.sources[1].average is None  # not live
    start = {name: value.clone() for name, value in source.generator.state_dict().items()}
    assert all(torch.equal(value, start[name]) for name, value in source.average.state_dict().items())
    work.step(first)
    assert any(not torch.equal(value, start[name]) for name, value in source.generator.state_dict().items())
    for name, value in source.average.state_dict().items():
        torch.testing.assert_close(value, 0.5 * start[name] + 0.5 * source.generator.state_dict()[name])
    assert not any(parameter.requires_grad for parameter in source.average.parameters())
    images = work.pool.generated("student0", 2)  # two frozen members, then the live one
    live, _ = work.pool.draw(source.generator, "student0/live", 0, 2)
    earlier, _ = work.pool.draw(source.average, "student0/average", 0, 2)
    assert torch.equal(images, torch.cat([live[:4], earlier[4:]]))


def test_mirrored_images_are_those_of_before_from_the_other_side() -> None:
    plain, mirrored = (task(replace(SMALL_RECIPE, mirrored=value)) for value in (False, True))
    for work in (plain, mirrored):
        to_live_step(work)
    before, after = (work.pool.generated("student0", 0) for work in (plain, mirrored))
    same = [torch.equal(one, other) for one, other in zip(before, after, strict=True)]
    turned = [torch.equal(one.flip(2), other) for one, other in zip(before, after, strict=True)]
    assert [not item for item in same] == turned and 0 < sum(turned) < len(turned)
