"""Where values lie, what runs together, and which moves move nothing."""

from __future__ import annotations

import pytest
from hypothesis import given, settings

from dfq.engine.check import check_graph
from dfq.engine.graph import IntegerGraph, Layer, Move, Rescale, Table, inputs
from dfq.engine.memory import fuse, plan_memory
from dfq.engine.slices import Slices
from dfq_kernels.programs import stride_of
from tests.engine_graphs import BYTES, GRAPHS, SIGNED, Builder
from tests.random_networks import networks


def check_plan(graph: IntegerGraph) -> None:
    """Values that live together share no byte, unless one of them is the same channels of the other's plane."""
    shapes = check_graph(graph)
    groups = fuse(graph, shapes)
    places, total = plan_memory(graph, groups, shapes)
    _, without = plan_memory(graph, groups, shapes, reuse=False)
    assert total <= without
    made: dict[str, int] = {}
    last: dict[str, int] = {}
    for index, group in enumerate(groups):
        for name in (*group.outs, *group.inputs):
            if name in places:
                made.setdefault(places[name].root, index)
                last[places[name].root] = index
    for name, place in places.items():
        root = places[place.root]
        assert root.root == place.root and root.offset % 64 == 0 and root.offset + root.size <= total
        assert (place.height, place.width, place.frame) == (root.height, root.width, root.frame), name
        first = place.offset - root.offset
        assert first >= 0 and first + place.channels <= root.channels and place.stride == stride_of(root.channels)
    roots = [name for name, place in places.items() if place.root == name and place.kept]
    for one in roots:
        for other in roots:
            together = made[one] <= last[other] and made[other] <= last[one]
            if one != other and together:
                ends = places[one].offset + places[one].size, places[other].offset + places[other].size
                assert ends[0] <= places[other].offset or ends[1] <= places[one].offset


@settings(max_examples=150, deadline=None)
@given(graph=networks())
def test_values_that_live_together_share_no_byte(graph: IntegerGraph) -> None:
    check_plan(graph)


@pytest.mark.parametrize("name", GRAPHS)
def test_networks_made_by_hand_are_planned(name: str) -> None:
    check_plan(GRAPHS[name]())


@settings(max_examples=100, deadline=None)
@given(graph=networks())
def test_every_step_runs_once_and_after_what_it_reads(graph: IntegerGraph) -> None:
    groups, known = fuse(graph, check_graph(graph)), {"images"}
    for group in groups:
        assert set(inputs(group.step)) <= known
        for step in group.chained:
            assert step.x in group.step.outs and set(inputs(step)) - {step.x} <= known
        known |= set(group.outs)
    steps = [step for group in groups for step in (group.step, *group.chained)]
    assert sorted(step.outs for step in steps) == sorted(step.outs for step in graph.steps)
    assert sorted(sorted(inputs(step)) for step in steps) == sorted(sorted(inputs(step)) for step in graph.steps)


def moved(graph: IntegerGraph) -> list[Move]:
    """The moves whose result lies in another plane than one of their inputs."""
    slices = Slices(graph, check_graph(graph))
    moves = [step for step in graph.steps if isinstance(step, Move)]
    return [step for step in moves if len({slices.of(name)[0] for name in (*inputs(step), *step.outs)}) > 1]


def test_joined_maps_are_written_where_they_are_read() -> None:
    assert not moved(GRAPHS["dense"]()) and not moved(GRAPHS["inception"]())
    assert len(moved(GRAPHS["pyramid"]())) == 1  # the smaller map is cut out pixel by pixel


def test_a_copy_is_made_where_one_plane_is_not_enough() -> None:
    b = Builder((3, 4, 4))
    x, y, z = b.conv(b.first, 5), b.conv(b.first, 7), b.conv(b.first, 6)
    first, second = b.cat(x, y), b.cat(x, z)
    graph = b.graph(b.linear(b.cat(b.conv(first, 4), b.conv(second, 4)), 2))
    slices = Slices(graph, check_graph(graph))
    assert slices.of(x) == (second, 0) and slices.of(z) == (second, 5) and slices.of(y) == (first, 5)
    twice = Builder((3, 4, 4))
    x = twice.conv(twice.first, 5)
    graph = twice.graph(twice.linear(twice.cat(x, x), 2))
    assert Slices(graph, check_graph(graph)).of(x) == (x, 0)


def test_what_a_step_s_results_go_through_stays_in_registers() -> None:
    b = Builder((3, 4, 4))
    x = b.conv(b.first, 8, grid=SIGNED)
    y = b.conv(x, 8, grid=SIGNED)
    activated = b.table(y)
    total = b.plus(b.conv(activated, 8, grid=SIGNED), x, SIGNED)
    graph = b.graph(b.linear(b.rescale(total), 2))
    shapes = check_graph(graph)
    groups = fuse(graph, shapes)
    assert [[type(step).__name__ for step in (group.step, *group.chained)] for group in groups] == [
        ["Quantize"], ["Layer"], ["Layer", "Table"], ["Layer", "Add"], ["Rescale"], ["Layer"],
    ]  # fmt: skip
    places, _ = plan_memory(graph, groups, shapes)
    assert [name for name, place in places.items() if not place.kept] == [y, groups[3].step.outs[0]]
    kept, _ = plan_memory(graph, groups, shapes, reuse=False)
    assert all(place.kept for place in kept.values())


def test_a_sum_waits_for_both_of_its_sides() -> None:
    """x is fresh, its other side is not there yet: the addition is a step of its own, or goes with the later side."""
    b = Builder((3, 4, 4))
    x = b.conv(b.first, 8)
    y = b.conv(b.first, 8, 3)
    graph = b.graph(b.linear(b.plus(x, y), 2))
    (group,) = (group for group in fuse(graph, check_graph(graph)) if group.chained)
    assert group.step.outs == (y,) and group.chained[0].x == y and group.chained[0].other == x  # type: ignore[attr-defined]
    b = Builder((3, 4, 4), BYTES)
    x = b.conv(b.first, 8)
    graph = b.graph(b.linear(b.plus(x, x), 2))
    assert not any(group.chained for group in fuse(graph, check_graph(graph)))


def test_at_most_four_steps_are_chained() -> None:
    b = Builder((3, 4, 4))
    x = b.conv(b.first, 8)
    made = [b.rescale(x) if index % 2 else b.table(x) for index in range(6)]
    graph = b.graph(b.linear(b.cat(*made), 2))
    groups = fuse(graph, check_graph(graph))
    assert [len(group.chained) for group in groups if isinstance(group.step, Layer)] == [4, 0]
    assert sum(isinstance(group.step, (Rescale, Table)) for group in groups) == 2
