"""Faults that can be applied: a text that has moved on would be a fault that nobody plants."""

from __future__ import annotations

import pytest

from dfq_kernels.specs import all_specs
from tests.mutants import FILES, ROOT

TEXTS = [(ROOT / name).read_text() for name in FILES]


@pytest.mark.parametrize("op", all_specs())
def test_every_fault_has_its_text(op: str) -> None:
    mutations = all_specs()[op].mutations
    absent = [old for old, _ in mutations if not any(old in text for text in TEXTS)]
    assert mutations and not absent
