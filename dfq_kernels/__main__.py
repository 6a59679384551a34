"""`python -m dfq_kernels`: which backend runs which operator on which device, and the reason for every hole."""

from __future__ import annotations

import torch

from dfq_kernels import extension
from dfq_kernels.dispatch import TABLE, chosen, left, missing
from dfq_kernels.version import __version__


def main() -> None:
    """Prints what was built, then the support matrix; `*` marks what `backend=None` takes, `DFQ_BACKEND` considered."""
    print(extension.built())
    print(f"dfq-kernels {__version__}, torch {torch.__version__}, CUDA device: {torch.cuda.is_available()}")
    for op, devices in TABLE.items():
        for device, backends in devices.items():
            for backend in backends:
                reason = missing(op, backend, device)
                mark = "*" if backend == chosen(op, device) else " "
                leaves = left(op, backend) if reason is None else None
                there = f"no: {reason}" if reason else f"yes, but leaves {leaves} to reference" if leaves else "yes"
                print(f"{op:20} {device:5} {backend:10} {mark} {there}")


if __name__ == "__main__":
    main()
