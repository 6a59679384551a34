"""`python -m tests.with_module MODULE [pytest arguments]`: the tests with the file MODULE for the native module."""

from __future__ import annotations

import importlib.util
import sys

import pytest


def main() -> None:
    spec = importlib.util.spec_from_file_location("dfq_kernels._native", sys.argv[1])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["dfq_kernels._native"] = module
    spec.loader.exec_module(module)
    raise SystemExit(pytest.main(["-p", "no:cacheprovider", *sys.argv[2:]]))


if __name__ == "__main__":
    main()
