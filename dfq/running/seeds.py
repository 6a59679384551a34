"""Random numbers as a function of (seed, purpose, step): nothing to save, a resumed run draws the same ones.

Several processes draw the same ones, too: each takes its share of what is made of them (`dfq.running.ranks`).
"""

from __future__ import annotations

import hashlib

import torch


def random_source(seed: int, *path: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator for one purpose, e.g. `random_source(seed, "noise", step)`; independent of every other path."""
    digest = hashlib.sha256(repr((seed, 0, path)).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)


class seeded_initialisation:
    """Context in which torch's default generators (CPU, current GPU) are seeded for `path`, and restored afterwards."""

    def __init__(self, seed: int, *path: str | int) -> None:
        source = random_source(seed, *path)
        self.state, self.cuda_seed = source.get_state(), source.initial_seed()

    def __enter__(self) -> None:
        self.saved = torch.get_rng_state()
        torch.set_rng_state(self.state)
        self.saved_cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
        if self.saved_cuda is not None:
            torch.cuda.manual_seed(self.cuda_seed)

    def __exit__(self, *exc: object) -> None:
        torch.set_rng_state(self.saved)
        if self.saved_cuda is not None:
            torch.cuda.set_rng_state(self.saved_cuda)
