from dataclasses import dataclass
@dataclass(frozen=True)
class TeachConfig:
    """How a teacher is trained."""

    epochs: int = 12
    batch_size: int = 128
    learning_rate: float = 0.2
    weight_decay: float = 5e-4
