"""A quantized network in other forms: integers, ONNX."""

from dfq.export.integers import ExportError, export

__all__ = ["ExportError", "export"]
