"""Ranges of few bits: narrower where the squared error wants it, and nowhere else."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import dfq_kernels
from dfq.config import LayerBits, QuantConfig, quant_config
from dfq.method.clipping import RATIOS, _clip, clip_ranges
from dfq.quant import prepare
from dfq.quant.modes import averages_as_wide_as_their_inputs, batch_statistics
from dfq.quant.quantizers import ActivationQuantizer
from tests.conftest import small_net

AVERAGE = "calls.pool_adaptive_avg_pool2d.tail.quantizer"
Ends = dict[str, tuple[float, float]]


def ends(config: QuantConfig) -> tuple[Ends, Ends, dict[str, ActivationQuantizer]]:
    """Of every range: as seen on noise, and afterwards."""
    student = prepare(small_net(), (1, 12, 12), config)
    images = torch.randn(32, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    with batch_statistics(student), averages_as_wide_as_their_inputs(student):
        student(images)
    quantizers = {name: item for name, item in student.named_modules() if isinstance(item, ActivationQuantizer)}
    wide = {name: (float(item.running_min), float(item.running_max)) for name, item in quantizers.items()}
    clip_ranges(student, images)
    assert not any(item._forward_pre_hooks for item in student.modules())
    clipped = {name: (float(item.running_min), float(item.running_max)) for name, item in quantizers.items()}
    return wide, clipped, quantizers


def test_eight_bits_keep_what_was_seen() -> None:
    wide, clipped, _ = ends(quant_config("W2A8"))
    assert wide == clipped


@pytest.mark.parametrize(("preset", "widest"), [("W8A4", 0.95), ("W8A3", 0.7), ("W8A2", 0.6)])
def test_fewer_bits_are_narrower_on_both_sides_alike(preset: str, widest: float) -> None:
    wide, clipped, quantizers = ends(quant_config(preset))
    few = [name for name, item in quantizers.items() if item.bits < 8 and name != AVERAGE]
    assert len(few) >= 2
    for name in few:
        ratio = clipped[name][1] / wide[name][1]
        assert 0.1 < ratio <= widest, name
        assert clipped[name][0] == pytest.approx(ratio * wide[name][0], abs=1e-6), name
    assert all(clipped[name] == wide[name] for name in quantizers if name not in few)


def test_an_average_keeps_its_range() -> None:
    """Its noise averages out: a range that suits it would cut real features off."""
    config = replace(quant_config("W8A3"), last=LayerBits(8, 3))
    wide, clipped, quantizers = ends(config)
    assert quantizers[AVERAGE].bits == 3
    assert clipped[AVERAGE] == wide[AVERAGE]


def test_no_other_range_of_this_family_has_less_error(random: torch.Generator) -> None:
    def error(quantizer: ActivationQuantizer, values: Tensor) -> float:
        grid = quantizer.scale, quantizer.zero_point, quantizer.quant_min, quantizer.quant_max
        return float((dfq_kernels.fake_quant(values, *grid) - values).square().mean())

    values = torch.randn(4000, generator=random).relu() ** 1.5
    quantizer = ActivationQuantizer(3, signed=False, averaging_constant=0.1)
    quantizer.set_range(torch.zeros(()), values.max())
    _clip(quantizer, values)
    found, high = error(quantizer, values), float(values.max())
    for step in range(1, RATIOS + 1):
        quantizer.set_range(torch.zeros(()), torch.tensor(high * step / RATIOS))
        assert error(quantizer, values) >= found - 1e-9
