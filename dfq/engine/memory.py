"""What runs together and where values lie: one arena, planned once, whose bytes are used again when a value is dead."""

from __future__ import annotations

from dataclasses import dataclass, replace

from dfq.engine.fusion import Group, fuse, unstored
from dfq.engine.graph import IMAGES, IntegerGraph, Layer, as_map
from dfq.engine.rules import Shape, require
from dfq.engine.slices import Slices
from dfq_kernels.programs import ALIGNMENT, stride_of

__all__ = ["Group", "Place", "fuse", "plan_memory"]

LARGEST_ARENA = 2**32 - ALIGNMENT  # moves address it in 32 bits, and need one number that is no address


@dataclass(frozen=True)
class Place:
    """A value of one image: `channels` of `stride` bytes per pixel, inside a frame of zero points.

    offset: of the first byte in the arena, frame included; root: the value in whose plane it lies, which may be itself;
    kept: False where it is not stored at all.
    """

    height: int
    width: int
    channels: int
    stride: int
    frame: tuple[int, int]
    root: str
    offset: int = 0
    kept: bool = True

    @property
    def size(self) -> int:
        """Bytes of the whole plane."""
        return (self.height + 2 * self.frame[0]) * (self.width + 2 * self.frame[1]) * self.stride if self.kept else 0


def plan_memory(
    graph: IntegerGraph, groups: list[Group], shapes: dict[str, Shape], *, reuse: bool = True
) -> tuple[dict[str, Place], int]:
    """The place of every value on a grid, and the arena's bytes.

    Args:
        groups: of `fuse`.
        shapes: of `check_graph`.
        reuse: whether dead values' bytes are used again; False keeps all values to be looked at.
    """
    slices = Slices(graph, shapes)
    skipped = unstored(graph, groups) if reuse else set[str]()
    frames = _frames(graph, slices)
    dies: dict[str, int] = {}
    for index, group in enumerate(groups):
        dies |= dict.fromkeys([slices.of(name)[0] for name in (*group.inputs, *group.outs)], index)
    places: dict[str, Place] = {}
    roots: dict[str, Place] = {}
    alive: list[tuple[int, Place]] = []  # the last group that reads or writes it, where it lies
    total = 0
    for index, group in enumerate(groups):
        alive = [item for item in alive if not reuse or item[0] >= index]
        for out in group.outs:
            if out not in graph.grids:
                continue
            root, first = slices.of(out)
            if root not in roots:
                place = _place(root, shapes[root], frames.get(root, (0, 0)), kept=root not in skipped)
                roots[root] = place = _put(place, [item[1] for item in alive])
                alive.append((dies[root], place))
                total = max(total, place.offset + place.size)
            channels = as_map(shapes[out])[0]
            places[out] = replace(roots[root], channels=channels, offset=roots[root].offset + first)
    require(total <= LARGEST_ARENA, "the memory of one image", f"at most {LARGEST_ARENA} bytes", total)
    return places, total


def _frames(graph: IntegerGraph, slices: Slices) -> dict[str, tuple[int, int]]:
    """The widest padding that the readers of a plane ask for."""
    frames: dict[str, tuple[int, int]] = {}
    for step in graph.steps:
        if isinstance(step, Layer) and step.x != IMAGES:
            root = slices.of(step.x)[0]
            old = frames.get(root, (0, 0))
            frames[root] = max(old[0], step.padding[0]), max(old[1], step.padding[1])
    return frames


def _place(name: str, shape: Shape, frame: tuple[int, int], kept: bool) -> Place:
    channels, height, width = as_map(shape)
    return Place(height, width, channels, stride_of(channels), frame, name, kept=kept)


def _put(place: Place, others: list[Place]) -> Place:
    """The first gap between `others` that is large enough."""
    offset = 0
    for other in sorted((item for item in others if item.kept), key=lambda item: item.offset):
        if offset + place.size <= other.offset:
            break
        offset = max(offset, -(-(other.offset + other.size) // ALIGNMENT) * ALIGNMENT)
    return replace(place, offset=offset)
