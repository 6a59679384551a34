"""setup.py as a module, without its call of setuptools: how tests know nvcc and the sources as the build knows them."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

ROOT = Path(__file__).parent.parent


@cache
def build_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("dfq_kernels_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with patch("setuptools.setup"):
        spec.loader.exec_module(module)
    return module
