"""What a training step must launch and move on a GPU, counted without one: every operator's inputs and outputs.

Least numbers: an operator of torch's is one launch that reads its inputs and writes its outputs once; views and empty
tensors are none. Ours have the launches of `csrc/cuda` and the traffic of their specs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dfq_kernels.specs import nbytes

FREE = ("empty", "new_empty", "_unsafe_view", "as_strided_", "lift_fresh", "_local_scalar_dense")
LAYERS = {"fake_quant_weights": 64, "bn_stat_loss": 48}  # of one launch


def launches(operator: str, arguments: dict[str, Any]) -> int:
    """How many kernels a CUDA backend launches for one of our operators, by its name without the backend's."""
    op, backward = operator.removesuffix("_backward"), operator.endswith("_backward")
    if op in LAYERS:
        layers = next(value for value in arguments.values() if isinstance(value, list))
        return -(-len(layers) // LAYERS[op])
    if op == "bn_act_fake_quant":
        looks = 1 if backward else 2 * (arguments["training"] or arguments["observe"])
        return looks + 1 + (backward and arguments["training"])
    return {"fake_quant": 2 if backward else 1, "mask": 1, "observe_fake_quant": 3, "bn_stats": 1 if backward else 2,
            "bn_act_stats": 1 if backward else 2}[op]  # fmt: skip


def read_again(operator: str, arguments: dict[str, Any]) -> int:
    """Bytes that an operator of ours must read a second time: sums or a range come before the values."""
    x = arguments.get("x")
    if operator == "observe_fake_quant" or (
        operator == "bn_act_fake_quant" and (arguments["training"] or arguments["observe"])
    ):
        return nbytes(x)  # type: ignore[arg-type]
    return 2 * nbytes(x) if operator == "bn_act_fake_quant_backward" and arguments["training"] else 0  # type: ignore[arg-type]


class Counting(TorchDispatchMode):
    """Context that counts `launches` and `bytes_moved` of what runs inside."""

    def __init__(self) -> None:
        super().__init__()
        self.launches, self.bytes_moved = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")
        if func.is_view or name[0] == "profiler" or name[2].startswith(FREE):
            return result
        moved = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
        self.bytes_moved += sum(nbytes(_stored(tensor)) for tensor in moved)
        if name[0] != "dfq_kernels":
            self.launches += 1
            return result
        operator = name[2].rpartition("_")[0]
        arguments = dict(zip((item.name for item in func._schema.arguments), args, strict=False))
        self.launches += launches(operator, arguments)
        self.bytes_moved += read_again(operator, arguments)
        return result


def _stored(tensor: Tensor) -> Tensor:
    """An expanded tensor is read once for all its copies."""
    for axis, stride in enumerate(tensor.stride()):
        if stride == 0 and tensor.shape[axis] > 1:
            tensor = tensor.narrow(axis, 0, 1)
    return tensor


def predicted(step: Callable[[int], Callable[[], object]], batch: int) -> dict[str, Any]:
    """Launches and bytes of a step of `batch` images, from steps of 2 and 4: bytes grow with the batch in a line.

    Args:
        step: from a number of images to a step of that many.
    """
    counts = []
    for images in (2, 4):
        call = step(images)
        with Counting() as counted:
            call()
        counts.append(counted)
    few, more = counts
    slope = (more.bytes_moved - few.bytes_moved) / 2
    return {"launches": more.launches, "gigabytes": round((few.bytes_moved + slope * (batch - 2)) / 1e9, 3)}
