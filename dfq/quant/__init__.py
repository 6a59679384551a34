"""Float graph to fake-quantized graph."""

from dfq.quant.exactness import LayerBound, layer_bounds
from dfq.quant.graph import check_traced
from dfq.quant.prepare import PrepareError, prepare
from dfq.quant.quantizers import freeze_ranges, learn_ranges, range_parameters, set_adapting

__all__ = [
    "LayerBound", "PrepareError", "check_traced", "freeze_ranges", "layer_bounds", "learn_ranges", "prepare",
    "range_parameters", "set_adapting",
]  # fmt: skip
