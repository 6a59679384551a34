"""Float graph to fake-quantized graph."""

from dfq.quant.prepare import PrepareError, prepare
from dfq.quant.quantizers import freeze_ranges, learn_ranges, range_parameters, set_adapting

__all__ = ["PrepareError", "freeze_ranges", "learn_ranges", "prepare", "range_parameters", "set_adapting"]
