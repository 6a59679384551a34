"""Several processes that train one network: which one this is, its share of a batch, what all of them add up to.

Every process draws the same random numbers and makes the same images; its teacher and student see its share of them.
What is a mean over a batch becomes the mean over all shares: losses, statistics, gradients. So all take the same steps.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.nn.functional import all_reduce

from dfq.errors import check

_alone = 0


def world() -> int:
    """How many processes there are."""
    joined = dist.is_available() and dist.is_initialized() and not _alone
    return dist.get_world_size() if joined else 1


def rank() -> int:
    """Which of them this one is; 0 writes."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


@contextmanager
def joined(device: str) -> Iterator[str]:
    """Joins the processes that `torchrun` started, if it did; gives the device of this one.

    NCCL where every process has a GPU of its own, gloo on CPUs.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield device
        return
    on_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    check("dfq", "device", device, "auto, cpu or cuda with several processes", on_gpu or device in ("auto", "cpu"))
    mine = f"cuda:{os.environ['LOCAL_RANK']}" if on_gpu else "cpu"
    if on_gpu:
        torch.cuda.set_device(mine)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield mine
    finally:
        dist.destroy_process_group()


@contextmanager
def alone() -> Iterator[None]:
    """As if this process were the only one: for what all of them do in the same way, or one of them alone."""
    global _alone
    _alone += 1
    try:
        yield
    finally:
        _alone -= 1


def check_shares(owner: str, sizes: Mapping[str, int]) -> None:
    """Every batch must fall into shares of one size."""
    for name, size in sizes.items():
        check(owner, name, size, f"a multiple of the {world()} processes", size % world() == 0)


def share(batch: Tensor) -> Tensor:
    """This process's rows."""
    count = len(batch) // world()
    return batch if world() == 1 else batch[rank() * count : (rank() + 1) * count]


def mean(value: Tensor) -> Tensor:
    """Over all processes, with its gradient in each of them."""
    if world() == 1:
        return value
    return all_reduce(value.clone()) / world()  # type: ignore[no-any-return]


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Those of every share's mean loss become those of the mean over all shares; in one message."""
    if world() == 1:
        return
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not grads:
        return
    flat = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(flat)
    flat /= world()
    for grad, values in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(values.view_as(grad))


def averaged(metrics: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Loss terms of all processes: NaN in one is NaN in all, so they stop together."""
    if world() == 1 or not metrics:
        return metrics
    values = torch.stack([value.float() for value in metrics.values()])
    dist.all_reduce(values)
    return dict(zip(metrics, values / world(), strict=True))


def anywhere(flag: bool) -> bool:
    """Whether it is so in any process."""
    if world() == 1:
        return flag
    found = torch.tensor([float(flag)], device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return bool(found)


def wait() -> None:
    """Until all processes are here."""
    if world() > 1:
        dist.barrier()
