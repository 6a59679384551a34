"""The pool deals the same images whenever it is asked, and makes each only once."""

from __future__ import annotations

import torch

from dfq.method.generator import Generator
from dfq.method.pool import ImagePool
from dfq.running.execution import Execution


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
