"""The embedded default: a WRN-16-1 teacher for Fashion-MNIST, and the data set's 10,000 test images.

Fashion-MNIST is by Zalando Research, MIT licence. `teacher.json` beside the weights says how they were trained.
"""

from __future__ import annotations

import hashlib
import json
from importlib import resources
from pathlib import Path

from torch import nn

from dfq.models import ModelSpec, build_model
from dfq.running.checkpoint import CheckpointError, load_weights

ASSETS = Path(str(resources.files("dfq") / "assets"))
SPEC = ModelSpec("wrn-16-1", in_channels=1, num_classes=10, stem="cifar")
INPUT_SHAPE = (1, 32, 32)
DATASET = "fashion-mnist"


def teacher_facts() -> dict[str, object]:
    """Recipe, seed, accuracy and SHA-256 of the embedded weights."""
    return json.loads((ASSETS / "teacher.json").read_text())


def load_teacher() -> nn.Module:
    """The embedded teacher in evaluation mode.

    Raises:
        CheckpointError: the file is not the one that was shipped.
    """
    path = ASSETS / "teacher.safetensors"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != teacher_facts()["sha256"]:
        raise CheckpointError(f"embedded: {path} must have SHA-256 {teacher_facts()['sha256']}, got {digest}")
    model = build_model(SPEC)
    load_weights(model, path)
    return model.eval()
