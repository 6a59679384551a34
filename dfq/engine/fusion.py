"""What runs together: a step, and the steps that read its results while they are in registers."""

from __future__ import annotations

from dataclasses import dataclass, replace

from dfq.engine.graph import Add, IntegerGraph, MaxPool, Move, Multiply, Rescale, Step, Table, as_map, inputs
from dfq.engine.rules import Shape

MOST_CHAINED = 4  # steps of a group: csrc/cpu/program.h


@dataclass(frozen=True)
class Group:
    """A step, and the steps whose x is a result of it that they take out of registers."""

    step: Step
    chained: tuple[Step, ...] = ()

    @property
    def outs(self) -> tuple[str, ...]:
        return self.step.outs + tuple(out for step in self.chained for out in step.outs)

    @property
    def inputs(self) -> list[str]:
        return [name for step in (self.step, *self.chained) for name in inputs(step)]


def fuse(graph: IntegerGraph, shapes: dict[str, Shape]) -> list[Group]:
    """The steps in their order, each step that can be chained with the step that makes what it reads.

    Args:
        graph: checked.
        shapes: of `check_graph`.
    """
    groups: list[Group] = []
    maker: dict[str, int] = {}  # the group of every value
    open_to: dict[str, int] = {}  # the same, of values that pass through registers
    for step in graph.steps:
        chained, place = _chained(step, shapes, maker, open_to)
        rounded = all(out in graph.grids for out in step.outs)  # real results end in memory
        if place is not None and rounded and len(groups[place].chained) < MOST_CHAINED:
            groups[place] = Group(groups[place].step, (*groups[place].chained, chained))
            maker |= dict.fromkeys(step.outs, place)
            continue
        maker |= dict.fromkeys(step.outs, len(groups))
        if not isinstance(step, (MaxPool, Move)):
            open_to |= dict.fromkeys(step.outs, len(groups))
        groups.append(Group(step))
    return groups


def _chained(
    step: Step, shapes: dict[str, Shape], maker: dict[str, int], open_to: dict[str, int]
) -> tuple[Step, int | None]:
    """The step as one of a group, whose x comes out of registers, and the group; None: it runs alone."""
    if isinstance(step, (Rescale, Table)):
        return step, open_to.get(step.x)
    if not isinstance(step, (Add, Multiply)):
        return step, None
    shape = as_map(shapes[step.outs[0]])
    for fresh, other in ((step.x, step.other), (step.other, step.x)):
        place = open_to.get(fresh)
        ready = place is not None and maker[other] < place
        if ready and as_map(shapes[fresh]) == shape and as_map(shapes[other]) in (shape, (shape[0], 1, 1)):
            return replace(step, x=fresh, other=other), place  # sums and products are the same both ways
    return step, None


def unstored(graph: IntegerGraph, groups: list[Group]) -> set[str]:
    """Values that nobody reads but steps of their own group, out of registers."""
    read = {name for group in groups for name in inputs(group.step)}
    for group in groups:
        for step in group.chained:
            read |= set(inputs(step)) - {step.x}
    through = {
        out for group in groups if not isinstance(group.step, (MaxPool, Move)) for out in group.outs
    }  # fmt: skip
    return {name for name in graph.grids if name in through and name not in read}
