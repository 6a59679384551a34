"""What a data-free training is made of, for a checkpoint, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dfq.method.student_optimizers import student_optimizers
from dfq.running.optimizers import load_optimizer

if TYPE_CHECKING:
    from dfq.method.trainer import DataFreeTraining


def state_of(task: DataFreeTraining) -> dict[str, Any]:
    """All that the next steps depend on."""
    return {
        "generators": [source.generator.state_dict() for source in task.sources],
        "generator_optimizers": [source.optimizer.state_dict() for source in task.sources],
        "averages": [source.average.state_dict() for source in task.sources if source.average is not None],
        "snapshot_owners": task.snapshot_owners,
        "snapshots": [generator.state_dict() for generator in task.pool.frozen],
        "bits": task.bits,
        "rungs": task.rungs,
        "students": [student.state_dict() for student in task.students],
        "optimizers": [[optimizer.state_dict() for optimizer in row] for row in task.optimizers],
    }


def restore(task: DataFreeTraining, state: dict[str, Any]) -> None:
    """The inverse; what does not fit raises before a step is done."""
    task.execution.reset()
    for source, weights, optimizer in zip(
        task.sources, state["generators"], state["generator_optimizers"], strict=True
    ):
        source.generator.load_state_dict(weights)
        load_optimizer(source.optimizer, optimizer)
    averages = [source.average for source in task.sources if source.average is not None]
    for average, weights in zip(averages, state["averages"], strict=True):
        average.load_state_dict(weights)
    task.pool.frozen, task.snapshot_owners = [], []
    for owner, weights in zip(state["snapshot_owners"], state["snapshots"], strict=True):
        task.add_snapshot(task.sources[owner])
        task.pool.frozen[-1].load_state_dict(weights)
    task.use_bits(state["bits"])
    task.rungs = {
        rung: {name: value.to(task.device) for name, value in values.items()} for rung, values in state["rungs"].items()
    }
    for values in task.rungs.values():
        task.students[0].load_state_dict(values)  # it fits, or the checkpoint is refused now
    for student, weights in zip(task.students, state["students"], strict=True):
        student.load_state_dict(weights)
    if task.quant and state["optimizers"]:
        # of the students' phase: learned ranges are parameters
        task.optimizers = student_optimizers(task.students, task.recipe)
    for row, saved in zip(task.optimizers, state["optimizers"], strict=True):
        for optimizer, values in zip(row, saved, strict=True):
            load_optimizer(optimizer, values)
