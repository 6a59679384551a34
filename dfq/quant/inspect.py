"""What a fake-quantized network is made of, as plain data: its values, its calls, and what stays in floating point."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

from dfq.layers import Float
from dfq.layers.kind import Layer
from dfq.layers.weighted import QuantLayer
from dfq.network.calls import MODULE, is_size, target_of
from dfq.quant.build import KIND
from dfq.quant.exactness import LayerBound, layer_bounds
from dfq.quant.prepare import prepared_of
from dfq.quant.quantizers import ActivationQuantizer, weight_layers


def student_facts(student: fx.GraphModule) -> dict[str, Any]:
    """Every value with its grid, every call in order, every call in floating point, and the share of integers.

    Args:
        student: of `dfq.prepare`; it stays as it is. Ranges that nothing has set yet are those of the start.

    Returns:
        `values`, `sequence`, `layers`, `floats`, `multiplications_per_image`, `integer_share` (of the multiplications,
        0 to 1: those of convolutions, linear layers and products of matrices), `input_shape`.
    """
    known = prepared_of(student)
    walk = _Walk(student, {bound.layer: bound for bound in layer_bounds(student)})
    mode = student.training
    parameter = next(student.parameters())
    image = torch.zeros(1, *known.input_shape, device=parameter.device)
    try:
        walk.run_once(image)
    finally:
        student.train(mode)
    total = sum(row["multiplications"] for row in walk.rows)
    for row in walk.rows:
        row["share"] = row["multiplications"] / total if total else 0.0
    whole = sum(row["multiplications"] for row in walk.rows if row["integer"])
    return {
        "input_shape": list(known.input_shape), "multiplications_per_image": total,
        "integer_share": whole / total if total else 1.0, "values": walk.values, "sequence": walk.rows,
        "layers": walk.layers, "floats": walk.floats,
    }  # fmt: skip


class _Walk(fx.Interpreter):
    """One image through the exact forward; a row for every call on its way."""

    def __init__(self, student: fx.GraphModule, bounds: dict[str, LayerBound]) -> None:
        super().__init__(student)
        self.student, self.bounds = student, bounds
        self.outputs = {name: len(weight) for name, _, weight in weight_layers(student)}
        self.rows: list[dict[str, Any]] = []
        self.values: list[dict[str, Any]] = []
        self.layers: list[dict[str, Any]] = []
        self.floats: list[dict[str, Any]] = []

    @torch.no_grad()
    def run_once(self, image: Tensor) -> None:
        self.student.eval()
        self.run(image)

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "call_function" and isinstance(n.meta.get(KIND), Float):
            with FlopCounterMode(display=False) as counter:
                result = super().run_node(n)
            attends = "scaled_dot_product_attention" in target_of(n)
            count = self._attention(n, result) if attends else counter.get_total_flops() // 2
            self._float(n, n.meta[KIND].reason, result, count)
            return result
        result = super().run_node(n)
        if n.op == "call_module":
            self._module(n, self.student.get_submodule(str(n.target)), result)
        elif n.op == "call_function" and KIND in n.meta and not is_size(n):
            self._row(n.meta[KIND].name, n.name, result)
        return result

    def _module(self, node: fx.Node, module: nn.Module, result: Any) -> None:
        name = str(node.target)
        quantizers = [item for item in module.modules() if isinstance(item, ActivationQuantizer)]
        shown = name.removeprefix("calls.").removeprefix("quantizers.")
        if isinstance(module, ActivationQuantizer):
            self._row("quantize", shown, result)
        elif isinstance(module, Layer):
            own = getattr(module.tail, "quantizer", None)
            quantizers = [] if own is None else [own]
            row = self._row(_kind(module), shown, result)
            row["activation"] = module.tail.activation
            if isinstance(module, QuantLayer):
                self._layer(name, module, row, result)
        else:
            return
        value = result[0] if isinstance(result, tuple) else result
        self.values += [_value(shown, quantizer, value, self.rows[-1]["kind"]) for quantizer in quantizers]

    def _layer(self, name: str, module: QuantLayer, row: dict[str, Any], result: Any) -> None:
        value, bound, weight = (result[0] if isinstance(result, tuple) else result), self.bounds[name], module.weight
        count = weight.numel() * value.numel() // self.outputs[name]
        row |= {"weight_bits": bound.weight_bits, "activation_bits": bound.activation_bits, "multiplications": count}
        if bound.activation_bits is None:
            row["integer"] = False
            why = "its input is not quantized"
            self.floats.append({"module": name, "call": row["kind"], "why": why, "multiplications": count})
        self.layers.append(
            {
                "layer": name, "weight_shape": list(weight.shape), "weight_bits": bound.weight_bits,
                "activation_bits": bound.activation_bits, "weight_bytes": -(-weight.numel() * bound.weight_bits // 8),
                "multiplications": count, "bound": bound.bound, "exact_in_fp32": bound.exact_in_fp32,
            }
        )  # fmt: skip

    def _attention(self, node: fx.Node, result: Tensor) -> int:
        """Products of both matrix multiplications, which torch does not count on every device."""
        queries, keys = (self.env[item] for item in node.args[:2])  # type: ignore[index]
        places = queries.numel() // queries.shape[-1] * keys.shape[-2]
        return int(places * (queries.shape[-1] + result.shape[-1]))

    def _float(self, node: fx.Node, why: str, result: Any, count: int) -> None:
        module, call = str(node.meta.get(MODULE, "")), target_of(node)
        if call.startswith("getitem"):
            return
        row = self._row(call, module or node.name, result)
        row |= {"integer": False, "multiplications": count}
        self.floats.append({"module": module, "call": call, "why": why, "multiplications": count})

    def _row(self, kind: str, name: str, result: Any) -> dict[str, Any]:
        value = result[0] if isinstance(result, (tuple, list)) else result
        self.rows.append(
            {
                "kind": kind, "name": name, "integer": True, "activation": None, "weight_bits": None,
                "activation_bits": None, "shape": list(value.shape[1:]) if isinstance(value, Tensor) else [],
                "multiplications": 0,
            }
        )  # fmt: skip
        return self.rows[-1]


def _kind(module: Layer) -> str:
    """`QuantAveragePool` as people write it."""
    words = re.findall(r"[A-Z][a-z0-9]*|[A-Z]+(?![a-z])", type(module).__name__.removeprefix("Quant"))
    return " ".join(words).lower()


def _value(name: str, quantizer: ActivationQuantizer, value: Tensor, maker: str) -> dict[str, Any]:
    return {
        "value": name, "bits": quantizer.bits, "signed": quantizer.quant_min < 0,
        "scale": float(quantizer.current_scale()), "zero_point": int(quantizer.zero_point),
        "quant_min": quantizer.quant_min, "quant_max": quantizer.quant_max, "shape": list(value.shape[1:]),
        "made_by": maker,
    }  # fmt: skip
