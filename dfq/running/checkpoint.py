"""Tensors and plain values in one safetensors file: written atomically, never unpickled."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from dfq.errors import first_line


class CheckpointError(ValueError):
    """A file that cannot be written, or cannot be read as what it should be."""


def write_atomic(path: Path, data: bytes) -> None:
    """Writes beside `path`, then renames: a reader sees the old file or the new one, whatever happens in between."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        raise CheckpointError(f"checkpoint: {path} cannot be written: {error.strerror}") from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def save_tree(path: Path, tree: Any) -> None:
    """Saves nested dicts, lists and tuples of tensors and JSON values in one atomic safetensors file."""
    tensors: dict[str, Tensor] = {}
    structure = _flatten(tree, "", tensors)
    write_atomic(path, save(tensors, metadata={"tree": json.dumps(structure)}))


def load_tree(path: Path) -> Any:
    """What `save_tree` saved.

    Raises:
        CheckpointError: missing, truncated, or not written by `save_tree`.
    """
    try:
        with safe_open(path, framework="pt") as file:
            structure = json.loads((file.metadata() or {})["tree"])
            return _unflatten(structure, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 (not iterable)
    except (OSError, SafetensorError, KeyError, TypeError, IndexError, ValueError) as error:
        raise CheckpointError(f"checkpoint: {path} cannot be read: {_reason(error)}") from error


def _flatten(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        # clone: a safetensors file holds no views, and a state must not change while it is being written
        tensors[path] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"tensor": path}
    if isinstance(value, dict):
        return {"dict": [[key, _flatten(item, f"{path}/{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_flatten(item, f"{path}/{index}", tensors) for index, item in enumerate(value)]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"value": value}
    raise CheckpointError(f"checkpoint: a value at {path} must be a tensor or JSON, got {type(value).__name__}")


def _unflatten(structure: Any, tensors: dict[str, Tensor]) -> Any:
    ((kind, body),) = structure.items()
    if kind == "tensor":
        return tensors[body]
    if kind == "dict":
        return {key: _unflatten(item, tensors) for key, item in body}
    if kind in ("list", "tuple"):
        items = [_unflatten(item, tensors) for item in body]
        return items if kind == "list" else tuple(items)
    if kind == "value":
        return body
    raise KeyError(f"unknown node {kind!r}")


def load_weights(model: nn.Module, path: Path) -> None:
    """Loads a safetensors file, or a `torch.save` file through the restricted `weights_only` reader, into `model`.

    A checkpoint may be the state dict itself or hold it under `state_dict` or `model`; a `module.` prefix is dropped.

    Raises:
        CheckpointError: missing or unreadable file, other names or shapes than the model's, or non-finite weights.
    """
    state = _read_state_dict(path)
    expected = model.state_dict()
    if not state.keys() & expected.keys():  # saved from a DataParallel
        state = {name.removeprefix("module."): value for name, value in state.items()}
    if missing := [name for name in expected if name not in state and not name.endswith("num_batches_tracked")]:
        raise CheckpointError(f"checkpoint: {path} must hold every tensor of the model, got none of {missing[0]!r}")
    if extra := [name for name in state if name not in expected]:
        raise CheckpointError(f"checkpoint: {path} must hold no other tensors than the model's, got {extra[0]!r}")
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape:
            raise CheckpointError(
                f"checkpoint: {name} in {path} must have shape {tuple(expected[name].shape)}, got {tuple(tensor.shape)}"
            )
        if tensor.is_floating_point() != expected[name].is_floating_point() or tensor.dtype not in _LOADABLE:
            raise CheckpointError(f"checkpoint: {name} in {path} must be of {expected[name].dtype}, got {tensor.dtype}")
        if tensor.is_meta or tensor.layout != torch.strided:
            raise CheckpointError(f"checkpoint: {name} in {path} must hold its values, got a meta or sparse tensor")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"checkpoint: {name} in {path} must be finite, got NaN or infinity")
    model.load_state_dict(state, strict=False)


_LOADABLE = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
)

# what torch's reader raises on bytes that are not its own
_TORN = (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, TypeError, AttributeError, LookupError)


def _read_state_dict(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                state: Any = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what it would say is said below
                state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"checkpoint: {path} cannot be read: {_reason(error)}") from error
    except _TORN as error:
        reason = _refusal(error)
        raise CheckpointError(f"checkpoint: {path} cannot be read: it must be a torch.save file, {reason}") from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    named = isinstance(state, dict) and all(isinstance(name, str) for name in state)
    if not named or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"checkpoint: {path} must hold a state dict of tensors, got {type(state).__name__}")
    return state


def _refusal(error: Exception) -> str:
    """What a file is that the weights_only reader refuses; its own text advises to unpickle, which runs any code."""
    text = str(error)
    if found := re.search(r"GLOBAL ([\w.]+)", text):
        return f"got one with {found[1]} in it, which is no tensor; save model.state_dict() where the model is"
    if "TorchScript" in text:
        return "got a TorchScript archive; save its state_dict() where the model is"
    return "got a file of another kind, an empty or a truncated one"


def weights_digest(model: nn.Module) -> str:
    """SHA-256 of every tensor of the state dict, with its name: which weights these are."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def tensor_digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's values."""
    return hashlib.sha256(_bytes(tensor)).hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def save_weights(model: nn.Module, path: Path, metadata: dict[str, str] | None = None) -> None:
    """Saves a model's state dict as one atomic safetensors file."""
    state = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in model.state_dict().items()
    }
    write_atomic(path, save(state, metadata=metadata))


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return first_line(error)
