"""The pitch network CREPE (tiny) of the package `torchcrepe`, with the weights that it carries, in integers.

Its input is 1,024 samples of sound at 16 kHz. The package has no sound of its own, so tones are made here: a few
harmonics with a little noise, gliding over four octaves, cut into frames and normalised by the package's `preprocess`.
Calibrated on some tones, judged on others; a class is a pitch of 20 cents.
"""

from __future__ import annotations

import math

import torch
import torchcrepe
from measure import finish, network
from torch import Tensor


def tones(seed: int, count: int, seconds: float = 1.0) -> tuple[Tensor, Tensor]:
    """Frames `[N, 1024]` of gliding tones, and the pitch of each frame's middle in Hz."""
    random = torch.Generator().manual_seed(seed)
    rate, frames, pitches = torchcrepe.SAMPLE_RATE, [], []
    for _ in range(count):
        first, last = (80 * 2 ** (4 * torch.rand(2, generator=random))).tolist()
        time = torch.arange(int(seconds * rate)) / rate
        pitch = first * (last / first) ** (time / seconds)
        phase = 2 * math.pi * torch.cumsum(pitch / rate, 0)
        loudness = torch.rand(6, generator=random) / torch.arange(1, 7)
        sound = sum(loudness[n] * torch.sin((n + 1) * phase) for n in range(6))
        sound = sound + 0.01 * torch.randn(len(time), generator=random)
        cut = next(torchcrepe.preprocess(sound[None], rate, hop_length=160, pad=False))
        frames.append(cut)
        pitches.append(pitch[torch.arange(len(cut)) * 160 + torchcrepe.WINDOW_SIZE // 2])
    return torch.cat(frames), torch.cat(pitches)


def bins(pitch: Tensor) -> Tensor:
    """The class of a pitch: the nearest one."""
    return torchcrepe.convert.cents_to_bins(torchcrepe.convert.frequency_to_cents(pitch), quantize_fn=torch.round)


if __name__ == "__main__":
    torchcrepe.load.model("cpu", "tiny")
    calibrating, _ = tones(seed=1, count=8)
    judging, pitch = tones(seed=2, count=10)
    found = network("torchcrepe tiny", torchcrepe.infer.model, calibrating.split(128), judging, bins(pitch))
    told = {"calibrated_on": "8 gliding tones made here", "judged_on": "10 other gliding tones"}
    finish([found | told], __doc__)
