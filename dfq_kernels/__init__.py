"""Fused operators for quantization-aware and data-free training. `python -m dfq_kernels` says what runs where."""

from dfq_kernels.bn_act_fake_quant.api import bn_act_fake_quant
from dfq_kernels.bn_act_stats.api import bn_act_stats
from dfq_kernels.bn_stat_loss.api import bn_stat_loss
from dfq_kernels.bn_stats.api import bn_stats
from dfq_kernels.dispatch import BackendError
from dfq_kernels.fake_quant.api import fake_quant
from dfq_kernels.fake_quant_conv2d.api import fake_quant_conv2d
from dfq_kernels.fake_quant_weights.api import fake_quant_weights
from dfq_kernels.int_conv2d.api import int_conv2d, int_linear, pack_weight
from dfq_kernels.int_pool.api import int_pool
from dfq_kernels.int_resize.api import int_resize
from dfq_kernels.integers import Grid, PackedWeight, QuantizedTensor, Requantize
from dfq_kernels.observe_fake_quant.api import observe_fake_quant
from dfq_kernels.packing import pack_bits, unpack_bits
from dfq_kernels.quantize.api import quantize
from dfq_kernels.requantize.api import dequantize, requantize
from dfq_kernels.version import __version__

__all__ = [
    "BackendError",
    "Grid",
    "PackedWeight",
    "QuantizedTensor",
    "Requantize",
    "__version__",
    "bn_act_fake_quant",
    "bn_act_stats",
    "bn_stat_loss",
    "bn_stats",
    "dequantize",
    "fake_quant",
    "fake_quant_conv2d",
    "fake_quant_weights",
    "int_conv2d",
    "int_linear",
    "int_pool",
    "int_resize",
    "observe_fake_quant",
    "pack_bits",
    "pack_weight",
    "quantize",
    "requantize",
    "unpack_bits",
]
