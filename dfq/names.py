"""The public names of `dfq`, each imported when it is asked for: whoever runs integers loads no trainer."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

# name -> the module that has it
WHERE = {
    "distill": "api", "load_run": "api", "quantize": "api", "teach": "api", "Result": "results.finish",
    "LayerBits": "config", "QuantConfig": "config", "Recipe": "config", "quant_config": "config",
    "accuracy": "results.evaluate", "ModelSpec": "models", "build_model": "models",
    "prepare": "student", "calibrate": "student", "export_integers": "student", "export_onnx": "student",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Of `dfq`: one of its names, or a module of it."""
    if name in WHERE:
        return getattr(import_module(f"dfq.{WHERE[name]}"), name)
    if find_spec(f"dfq.{name}") is None:
        raise AttributeError(f"module 'dfq' has no attribute {name!r}")
    return import_module(f"dfq.{name}")
