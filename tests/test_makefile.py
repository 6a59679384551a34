"""The developer interface names what exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAKEFILE = (ROOT / "Makefile").read_text()


def test_the_fast_tests_exist_and_are_few() -> None:
    (listed,) = re.findall(r"^FAST := (.*?[^\\])$", MAKEFILE, re.MULTILINE | re.DOTALL)
    names = listed.replace("\\\n", " ").split()
    absent = [name for name in names if not (ROOT / "tests" / f"test_{name}.py").exists()]
    assert len(names) > 5 and not absent


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_documents_name_targets_that_exist(document: str) -> None:
    named = set(re.findall(r"`make ([\w-]+)", (ROOT / document).read_text()))
    assert named and named <= set(re.findall(r"^([\w-]+):", MAKEFILE, re.MULTILINE))


def test_every_target_is_phony() -> None:
    (phony,) = re.findall(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)
    assert set(phony.split()) == set(re.findall(r"^([\w-]+):", MAKEFILE, re.MULTILINE))
