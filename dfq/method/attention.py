"""Where networks look: the last feature map of every size, without its channels.

    A(x) = a / |a|,  a = sum over channels of max(x, 0)^2, at every position
    L = sum over the sizes that teacher and student have in common of |A(teacher) - A(student)|^2, mean over images

A map of the teacher says where its classes are found, at hundreds of positions; its logits are ten numbers. Networks of
any widths and depths have maps that can be compared. Source: S. Zagoruyko and N. Komodakis, Paying More Attention to
Attention, ICLR 2017, section 3.1.
"""

from __future__ import annotations

import warnings
from collections import ChainMap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dfq.network.outputs import evaluation

Size = tuple[int, int]
Maps = Mapping[Size, Tensor]


@contextmanager
def feature_maps(network: nn.Module, wanted: bool = True) -> Iterator[Maps]:
    """Context in which a network leaves the last feature map of every size that a module of it returns.

    Where a module with parts (a block) returns one of a size, those of single layers do not count.

    Args:
        network: any; a map that no module returns (a sum in a `forward`) is not seen.
        wanted: whether it does; else there are none.
    """
    layers: dict[Size, Tensor] = {}
    blocks: dict[Size, Tensor] = {}

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        value = output[0] if isinstance(output, tuple) and output else output  # a quantized layer's, and its scale
        if isinstance(value, Tensor) and value.dim() == 4 and value.shape[2] * value.shape[3] > 1:
            (blocks if any(True for _ in module.children()) else layers)[value.shape[2], value.shape[3]] = value

    hooks = [module.register_forward_hook(note) for module in network.modules()] if wanted else []
    try:
        yield ChainMap(blocks, layers)
    finally:
        for hook in hooks:
            hook.remove()


def attention(x: Tensor) -> Tensor:
    """`A(x)`, `[N, H W]`, of maps `[N, C, H, W]`: unit vectors, 0 where nothing is positive."""
    return F.normalize(F.relu(x.float()).square().mean(1).flatten(1), dim=1)


def attention_distance(teacher: Maps, student: Maps) -> Tensor:
    """`L`, between 0 and twice the number of common sizes, of which there must be one."""
    apart = [
        (attention(teacher[size]) - attention(student[size])).square().sum(1).mean()
        for size in teacher
        if size in student
    ]
    return torch.stack(apart).sum()


@torch.no_grad()
def compares_maps(teacher: nn.Module, student: nn.Module, images: Tensor, who: str) -> bool:
    """Whether both make maps of one size; a warning says where a student is taught by the outputs alone."""
    with evaluation(student), feature_maps(teacher) as wanted, feature_maps(student) as maps:
        teacher(images)
        student(images)
        common = [size for size in wanted if size in maps]
    if not common:
        warnings.warn(
            f"{who} has no feature map of a size of the teacher's: it learns from the outputs alone", stacklevel=3
        )
    return bool(common)
