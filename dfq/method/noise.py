"""Noise in the place of images, with the mean and the deviation that a network's first batch norm remembers of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dfq.method.teacher import BatchNorm, BatchNormAct

SHARED = 0.9  # of the variance: what the channels of a photograph have in common, about
PROBES = 16  # noise images whose spread after the first layer is measured
TINY = 1e-12


@dataclass(frozen=True)
class Moments:
    """Of images: mean `[C]`, and one deviation for all channels; assumed: not found, but those of normalised images."""

    mean: Tensor
    deviation: float
    assumed: bool = False


def pink_noise(count: int, shape: tuple[int, ...], random: torch.Generator) -> Tensor:
    """Normal noise `[count, C, H, W]` with the spectrum of photographs, `1 / frequency`; mean 0, deviation 1.

    Source of the spectrum: D. J. Field, Relations between the statistics of natural images, JOSA A 4 (1987).
    """
    channels = shape[0]
    if len(shape) != 3:
        return torch.randn(count, *shape, generator=random)
    common, own = (_field(count, (number, *shape[1:]), random) for number in (1, channels))
    return own if channels == 1 else SHARED**0.5 * common + (1 - SHARED) ** 0.5 * own


def _field(count: int, shape: tuple[int, ...], random: torch.Generator) -> Tensor:
    _, height, width = shape
    spectrum = torch.fft.rfft2(torch.randn(count, *shape, generator=random))
    rows, columns = torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)[None]
    lowest = 1 / max(height, width)
    field = torch.fft.irfft2(spectrum / (rows**2 + columns**2 + lowest**2).sqrt(), s=(height, width))
    return field / field.std().clamp(min=TINY)


@torch.no_grad()
def image_moments(teacher: nn.Module, shape: tuple[int, ...], device: torch.device) -> Moments:
    """Mean and deviation of the images that a network was trained on, from its first batch norm.

    Between the images and that batch norm is an affine map, mostly one convolution. Its response to an image of ones
    in one channel gives one column of `R`, and the means solve `R mean = stored mean - response to zeros`, in the least
    squares of what the stored deviations weigh. The deviation is how much wider than that of noise the stored ones
    are; those channels count most that answer to a uniform image, since they depend least on the noise's spectrum.

    Args:
        teacher: of `dfq.method.teacher.teacher_graph`.
        shape: of one image.
        device: where it is.

    Returns:
        Moments, those of normalised images (0 and 1) where the map is not affine or says nothing.
    """
    random = torch.Generator().manual_seed(0)
    noise = pink_noise(PROBES, shape, random).to(device)
    norm, at_zero = _first_norm(teacher, torch.zeros_like(noise[:1]))
    _, spread = _first_norm(teacher, noise)
    _, mirrored = _first_norm(teacher, -noise)
    assert norm.running_mean is not None and norm.running_var is not None
    standard = Moments(torch.zeros(shape[0], device=device), 1.0, assumed=True)
    scale = (spread - at_zero).abs().max()
    if not bool((spread + mirrored - 2 * at_zero).abs().max() <= 1e-3 * scale):
        return standard
    ones = torch.eye(shape[0], device=device).view(shape[0], *shape[:1], *[1] * (len(shape) - 1))
    uniform = ones.expand(-1, -1, *shape[1:]) if len(shape) > 1 else ones
    answers = [_of_channels(_first_norm(teacher, image[None])[1] - at_zero) for image in uniform]
    response = torch.stack([answer.mean(1) for answer in answers], dim=1).double()
    stored, weight = norm.running_mean.double(), 1 / (norm.running_var.double() + norm.eps).sqrt()
    wanted = stored - _of_channels(at_zero).mean(1).double()
    solved = torch.linalg.lstsq((response * weight[:, None]).cpu(), (wanted * weight)[:, None].cpu()).solution[:, 0]
    _, at_mean = _first_norm(teacher, solved.float().to(device).view(1, -1, *[1] * (len(shape) - 1)).expand(1, *shape))
    edges = _of_channels(at_mean).var(1, correction=0).double()  # where zeros are padded to images of another mean
    variance = _of_channels(spread - at_zero).var(1, correction=0).double()
    heard = variance > TINY * variance.max()
    share = torch.where(heard, response.square().sum(1) / variance.clamp(min=TINY), 0.0)
    ratio = (norm.running_var.double() - edges).clamp(min=0) / variance.clamp(min=TINY)
    deviation = float((share * ratio).sum() / share.sum()) ** 0.5 if float(share.sum()) > 0 else 1.0
    moments = Moments(solved.float().to(device), deviation)
    return moments if bool(moments.mean.isfinite().all()) and 0 < deviation < float("inf") else standard


def _of_channels(x: Tensor) -> Tensor:
    """`[C, everything else]`."""
    return x.transpose(0, 1).flatten(1)


class _Reached(Exception):
    """The first batch norm has its input; the rest of the network need not run."""


def _first_norm(teacher: nn.Module, images: Tensor) -> tuple[BatchNorm, Tensor]:
    """The first batch norm that runs, and its input."""
    found: list[tuple[BatchNorm, Tensor]] = []

    def reach(module: nn.Module, inputs: tuple[Tensor]) -> None:
        found.append((module.bn, inputs[0].float()))  # type: ignore[arg-type]
        raise _Reached

    hooks = [
        module.register_forward_pre_hook(reach) for module in teacher.modules() if isinstance(module, BatchNormAct)
    ]
    try:
        teacher(images)
    except _Reached:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return found[0]
