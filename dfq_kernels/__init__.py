"""Fused operators for quantization-aware and data-free training. `python -m dfq_kernels` says what runs where."""

from dfq_kernels.bn_act_fake_quant.api import bn_act_fake_quant
from dfq_kernels.bn_act_stats.api import bn_act_stats
from dfq_kernels.bn_stat_loss.api import bn_stat_loss
from dfq_kernels.bn_stats.api import bn_stats
from dfq_kernels.dispatch import BackendError
from dfq_kernels.fake_quant.api import fake_quant
from dfq_kernels.fake_quant_weights.api import fake_quant_weights
from dfq_kernels.observe_fake_quant.api import observe_fake_quant
from dfq_kernels.packing import pack_bits, unpack_bits
from dfq_kernels.version import __version__

__all__ = [
    "BackendError",
    "__version__",
    "bn_act_fake_quant",
    "bn_act_stats",
    "bn_stat_loss",
    "bn_stats",
    "fake_quant",
    "fake_quant_weights",
    "observe_fake_quant",
    "pack_bits",
    "unpack_bits",
]
