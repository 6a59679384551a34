"""Statistics whose sums are far from their elements."""

from __future__ import annotations

import pytest
import torch

import dfq_kernels as k
from dfq_kernels.dispatch import missing
from tests.conftest import SEED


@pytest.mark.parametrize("backend", ["native", "triton", "reference"])
def test_squares_about_a_huge_sample_do_not_hide_a_finite_variance(backend: str) -> None:
    """Elements that the shift is taken from are outliers: about them the squares of all others overflow."""
    if (reason := missing("bn_stats", backend, "cpu")) is not None:
        pytest.skip(reason)
    x = torch.randn(64, 1, 32, 32, generator=torch.Generator().manual_seed(SEED))
    x.flatten(2)[::16, 0, 510:514] = 2e18
    var, mean = torch.var_mean(x.double(), unbiased=False)
    found_mean, found_var = k.bn_stats(x, backend=backend)
    assert float(found_var) == pytest.approx(float(var), rel=1e-4)
    assert abs(float(found_mean) - float(mean)) < 1e-5 * float(var.sqrt())
