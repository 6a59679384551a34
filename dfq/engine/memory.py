"""What runs together and where values lie: one arena, planned once, whose bytes are used again when a value is dead."""

from __future__ import annotations

from dataclasses import dataclass, replace

from dfq.engine.check import Shape, require
from dfq.engine.graph import IMAGES, AveragePool, IntegerGraph, Layer, MaxPool, Rescale, Step, inputs
from dfq_kernels.programs import ALIGNMENT, stride_of

LARGEST_ARENA = 2**32
MOST_CHAINED = 4  # rescale steps of a group


@dataclass(frozen=True)
class Place:
    """A value of one image: `channels` of `stride` bytes per pixel, inside a frame of zero points.

    offset, size: bytes in the arena, with the frame.
    """

    height: int
    width: int
    channels: int
    stride: int
    frame: tuple[int, int]
    offset: int = 0

    @property
    def size(self) -> int:
        return (self.height + 2 * self.frame[0]) * (self.width + 2 * self.frame[1]) * self.stride


@dataclass(frozen=True)
class Group:
    """A step, and the rescale steps that read a result of it while that is in registers."""

    step: Step
    chained: tuple[Rescale, ...] = ()

    @property
    def outs(self) -> tuple[str, ...]:
        return self.step.outs + tuple(out for step in self.chained for out in step.outs)

    @property
    def inputs(self) -> list[str]:
        return [name for step in (self.step, *self.chained) for name in inputs(step)]


def fuse(graph: IntegerGraph) -> list[Group]:
    """The steps in their order, each rescale step with the step that makes what it reads."""
    groups: list[Group] = []
    maker: dict[str, int] = {}
    for step in graph.steps:
        place = maker.get(step.x)
        rounded = all(out in graph.grids for out in step.outs)  # logits end in memory
        room = place is not None and len(groups[place].chained) < MOST_CHAINED
        if isinstance(step, Rescale) and rounded and room and place is not None:
            groups[place] = Group(groups[place].step, (*groups[place].chained, step))
            continue
        if not isinstance(step, MaxPool):
            maker |= dict.fromkeys(step.outs, len(groups))
        groups.append(Group(step))
    return groups


def plan_memory(
    graph: IntegerGraph, groups: list[Group], shapes: dict[str, Shape], *, reuse: bool = True
) -> tuple[dict[str, Place], int]:
    """The place of every value on a grid, and the arena's bytes.

    Args:
        groups: of `fuse`.
        shapes: of `check_graph`.
        reuse: whether dead values' bytes are used again; False keeps all values to be looked at.
    """
    frames = _frames(graph)
    dies = {name: index for index, group in enumerate(groups) for name in group.inputs}
    places: dict[str, Place] = {}
    alive: list[tuple[int, Place]] = []  # the last group that reads it, where it lies
    total = 0
    for index, group in enumerate(groups):
        alive = [item for item in alive if not reuse or item[0] >= index]
        for out in group.outs:
            if out not in graph.grids:
                continue
            place = _put(_place(shapes[out], frames.get(out, (0, 0))), [item[1] for item in alive])
            places[out] = place
            alive.append((dies.get(out, index), place))  # a value that nothing reads lives for its own step
            total = max(total, place.offset + place.size)
    require(total <= LARGEST_ARENA, "the memory of one image", f"at most {LARGEST_ARENA} bytes", total)
    return places, total


def _frames(graph: IntegerGraph) -> dict[str, tuple[int, int]]:
    """The widest padding that a value's readers ask for."""
    frames: dict[str, tuple[int, int]] = {}
    for step in graph.steps:
        if isinstance(step, (Layer, AveragePool)) and step.x != IMAGES:
            old = frames.get(step.x, (0, 0))
            frames[step.x] = max(old[0], step.padding[0]), max(old[1], step.padding[1])
    return frames


def _place(shape: Shape, frame: tuple[int, int]) -> Place:
    channels, height, width = shape if len(shape) == 3 else (shape[0], 1, 1)
    return Place(height, width, channels, stride_of(channels), frame)


def _put(place: Place, others: list[Place]) -> Place:
    """The first gap between `others` that is large enough."""
    offset = 0
    for other in sorted(others, key=lambda item: item.offset):
        if offset + place.size <= other.offset:
            break
        offset = max(offset, -(-(other.offset + other.size) // ALIGNMENT) * ALIGNMENT)
    return replace(place, offset=offset)
