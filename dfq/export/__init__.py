"""A quantized network in other forms: integers, ONNX."""

from dfq.export.integers import check_floats, export
from dfq.export.items import ExportError

__all__ = ["ExportError", "check_floats", "export"]
