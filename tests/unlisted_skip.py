"""Not collected: what `test_skips.py` runs to see a run turn red."""

import pytest


def test_that_nobody_runs() -> None:
    pytest.skip("it is Thursday")
