"""Convolutional classifiers by name, and any user's `package.module:factory`."""

from dfq.models.registry import MODEL_NAMES, ModelSpec, build_model

__all__ = ["MODEL_NAMES", "ModelSpec", "build_model"]
