"""Average pooling of a quantized graph: in evaluation an integer sum and one multiplication."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from dfq.quant.graph import PrepareError


class QuantAveragePool(nn.Module):
    """`float(sum(q - zero_point)) * (scale / count)` per window in evaluation; torch's own pooling in training.

    Args:
        kernel_size, stride, padding: of a plain pool; kernel_size None: adaptive.
        output_size: of an adaptive pool; None keeps an axis as it is.
        flat: drop the two pooled axes (a mean over height and width).
    """

    def __init__(
        self,
        *,
        kernel_size: Any = None,
        stride: Any = None,
        padding: Any = 0,
        output_size: Any = None,
        flat: bool = False,
    ) -> None:
        super().__init__()
        self.kernel_size, self.padding, self.flat = _pair(kernel_size), _pair(padding), flat
        self.stride = self.kernel_size if stride in (None, (), []) else _pair(stride)
        self.output_size = _pair(output_size)

    def forward(self, x: Tensor, scale: Tensor | None) -> Tensor:
        if self.training or scale is None:
            out = self._pool(x)
        else:
            with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
                count = self._count(x)
                integers = torch.round(x.float() * (1 / scale)).double()
                total = torch.round(self._pool(integers) * count).float()
                out = total * (scale / count.float())
        return out.flatten(1) if self.flat else out

    def _pool(self, x: Tensor) -> Tensor:
        if self.kernel_size is None:
            return F.adaptive_avg_pool2d(x, self.output_size)
        return F.avg_pool2d(x, self.kernel_size, self.stride, self.padding)

    def _count(self, x: Tensor) -> Tensor:
        """Elements of each window, float64, to broadcast over `[N, C, H, W]`."""
        if self.kernel_size is not None:
            return torch.tensor(float(self.kernel_size[0] * self.kernel_size[1]), dtype=torch.float64, device=x.device)
        sizes = []
        for size, wanted in zip(x.shape[2:], self.output_size, strict=True):
            index = torch.arange(size if wanted is None else wanted, device=x.device)
            parts = len(index)
            sizes.append(((index + 1) * size + parts - 1) // parts - index * size // parts)
        return (sizes[0][:, None] * sizes[1][None, :]).double()


_WINDOW = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")


def average_pool(node: fx.Node, model: nn.Module) -> QuantAveragePool:
    """The pooling module of a node that calls one as a module, a function or a method.

    Raises:
        PrepareError: windows that do not all divide by their size, or a mean over other axes.
    """
    if node.op == "call_module":
        module = model.get_submodule(str(node.target))
        if isinstance(module, nn.AdaptiveAvgPool2d):
            return QuantAveragePool(output_size=module.output_size)
        if not isinstance(module, nn.AvgPool2d):
            raise PrepareError(f"prepare: {node.target} must be an average pool, got {type(module).__name__}")
        return _plain(str(node.target), {name: getattr(module, name) for name in _WINDOW})
    if len(node.all_input_nodes) != 1:
        raise PrepareError(
            f"prepare: a pool must have constant windows (adaptive_avg_pool2d(x, 1) for a whole map), got sizes of a "
            f"tensor (node {node.name})"
        )
    if node.target in (torch.mean, "mean"):
        arguments = _named(node, ("dim", "keepdim"))
        dims = arguments.get("dim")
        if not isinstance(dims, (list, tuple)) or sorted(dim % 4 for dim in dims) != [2, 3]:
            raise PrepareError(f"prepare: a mean must be over height and width (2, 3), got {dims} (node {node.name})")
        return QuantAveragePool(output_size=1, flat=not arguments.get("keepdim", False))
    if node.target is F.adaptive_avg_pool2d:
        return QuantAveragePool(output_size=_named(node, ("output_size",))["output_size"])
    if node.target is not F.avg_pool2d:
        raise PrepareError(f"prepare: {node.name} must be an average pool, got {node.target}")
    return _plain(node.name, _named(node, _WINDOW))


def _named(node: fx.Node, names: tuple[str, ...]) -> dict[str, Any]:
    return {**dict(zip(names, node.args[1:], strict=False)), **node.kwargs}


def _plain(name: str, arguments: dict[str, Any]) -> QuantAveragePool:
    if arguments.get("ceil_mode", False):
        raise PrepareError(f"prepare: ceil_mode of {name} must be False, got True")
    if arguments.get("divisor_override") is not None:
        raise PrepareError(f"prepare: divisor_override of {name} must be None, got {arguments['divisor_override']}")
    padding = _pair(arguments.get("padding", 0))
    if padding != (0, 0) and not arguments.get("count_include_pad", True):
        raise PrepareError(f"prepare: count_include_pad of {name} must be True with padding, got False")
    return QuantAveragePool(
        kernel_size=arguments["kernel_size"], stride=arguments.get("stride"), padding=padding
    )  # fmt: skip


def _pair(value: Any) -> Any:
    if value is None:
        return None
    return tuple(value) if isinstance(value, (list, tuple)) else (value, value)
