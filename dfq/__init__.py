"""Quantization of convolutional networks to integers, with or without data (arXiv 2005.04136)."""

from dfq.names import __getattr__  # noqa: F401

__all__ = [
    "LayerBits",
    "ModelSpec",
    "QuantConfig",
    "Recipe",
    "Result",
    "accuracy",
    "build_model",
    "calibrate",
    "distill",
    "engine",
    "export_integers",
    "export_onnx",
    "load_run",
    "prepare",
    "quant_config",
    "quantize",
    "teach",
]
