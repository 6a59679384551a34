"""What every backend of `bn_stat_loss` has: arguments, results and their shapes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dfq_kernels.registration import Schema

_LISTS = "Tensor[] means, Tensor[] variances, Tensor[] running_means, Tensor[] running_vars, float[] eps"


def allocate(means: Sequence[Tensor], *rest: object) -> Tensor:
    """The loss, not yet written."""
    return means[0].new_empty((), dtype=torch.float32)


def allocate_grads(grad_out: Tensor, means: Sequence[Tensor], *rest: object) -> tuple[list[Tensor], list[Tensor]]:
    """Of every batch mean and variance, not yet written."""
    grads = [torch.empty_like(mean, dtype=torch.float32) for mean in means]
    return grads, [torch.empty_like(grad) for grad in grads]


FORWARD = Schema("bn_stat_loss", f"({_LISTS}) -> Tensor", allocate)
BACKWARD = Schema("bn_stat_loss_backward", f"(Tensor grad_out, {_LISTS}) -> (Tensor[], Tensor[])", allocate_grads)
