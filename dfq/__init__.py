"""Data-free network quantization by adversarial knowledge distillation (arXiv 2005.04136)."""

from dfq.api import Result, distill, load_run, quantize, teach
from dfq.config import LayerBits, QuantConfig, Recipe, quant_config
from dfq.evaluate import accuracy
from dfq.models import ModelSpec, build_model
from dfq.quant import prepare

__all__ = [
    "LayerBits",
    "ModelSpec",
    "QuantConfig",
    "Recipe",
    "Result",
    "accuracy",
    "build_model",
    "distill",
    "load_run",
    "prepare",
    "quant_config",
    "quantize",
    "teach",
]
