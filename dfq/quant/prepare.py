"""Float model to fake-quantized network: walks the captured calls and asks each kind of layer what it wants.

What is quantized: the input of every layer with weights and of every table, the weights, and every stream. A stream is
a value that anything in integers but a layer with weights, a table or a maximum computes with. It is quantized once,
with `residual_bits` (8 by default), and every reader reads the quantized one; a layer's input is quantized from it,
with the layer's bits. Streams are also what a maximum reads whose readers do not agree on bits, and what a
concatenation reads unless a step makes it for the concatenation alone. Of the two values of an addition, one that comes
straight from a layer stays an accumulator. A call without an integer form stays in floating point.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from dfq.config import QuantConfig
from dfq.layers import Float
from dfq.network import Network, PrepareError, capture
from dfq.quant.build import Builder
from dfq.quant.demands import Demands


@dataclass(frozen=True)
class Prepared:
    """What a quantized network knows of the model that it was made of; `prepared_of` gives it.

    input_shape: of one image. floats: the calls that stay in floating point: whose, which, why.
    """

    input_shape: tuple[int, ...]
    config: QuantConfig
    floats: tuple[tuple[str, str, str], ...]


KEY = "dfq"


def prepare(
    model: nn.Module | Network, input_shape: tuple[int, ...] | Tensor | None = None, config: QuantConfig | None = None
) -> fx.GraphModule:
    """Builds the fake-quantized network of `model`. Parameters and stored statistics are shared with `model`.

    Args:
        model: a float network of one image tensor, or what `dfq.network.capture` made of it.
        input_shape: of one image, or images; not for a captured network.
        config: bits and schemes.

    Returns:
        A `GraphModule` in training mode; its `eval()` is the exact forward.

    Raises:
        PrepareError: a network that cannot be captured or has nothing to quantize, or an override that names no layer.
    """
    config = config or QuantConfig()
    network = model if isinstance(model, Network) else capture(model, _shape(input_shape))
    demands = Demands(network, config)
    student = Builder(network, config, demands).build()
    floats = []
    for node, call in demands.calls.items():
        kind = demands.kinds[node]
        if isinstance(kind, Float) and not call.target.startswith("getitem"):
            floats.append((call.module, call.target, kind.reason))
    student.meta[KEY] = Prepared(network.input_shape, config, tuple(floats))
    return student.train()


def prepared_of(student: nn.Module, owner: str = "prepare") -> Prepared:
    """What `prepare` knew; owner: who is named in errors.

    Raises:
        ValueError: a network that `prepare` did not make.
    """
    found = student.meta.get(KEY) if isinstance(student, fx.GraphModule) else None
    if not isinstance(found, Prepared):
        raise ValueError(f"{owner}: student must be a network that dfq.prepare made, got a {type(student).__name__}")
    return found


def _shape(input_shape: Any) -> Any:
    if input_shape is None:
        raise PrepareError("prepare: input_shape must be given for a model that is not captured yet, got none")
    return input_shape
