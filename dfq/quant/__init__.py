"""Float network to fake-quantized network."""

from dfq.network import PrepareError
from dfq.quant.exactness import LayerBound, layer_bounds
from dfq.quant.prepare import Prepared, prepare, prepared_of
from dfq.quant.quantizers import freeze_ranges, learn_ranges, range_parameters, set_adapting, unset_ranges

__all__ = [
    "LayerBound", "PrepareError", "Prepared", "freeze_ranges", "layer_bounds", "learn_ranges", "prepare",
    "prepared_of", "range_parameters", "set_adapting", "unset_ranges",
]  # fmt: skip
