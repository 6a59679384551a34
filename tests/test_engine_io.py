"""Files of integer networks: what is written is read, and nothing that is not one gets past the reader."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save, save_file

from dfq import engine
from dfq.engine.check import check_graph
from dfq.engine.graph import IntegerGraph
from dfq.engine.io import KEY
from dfq.engine.memory import fuse, plan_memory
from dfq.engine.native import NativeNetwork
from dfq.running.checkpoint import CheckpointError
from dfq_kernels import extension, pack_bits, unpack_bits
from tests.conftest import SEED
from tests.engine_graphs import GRAPHS, reference_values, residual_network, same
from tests.random_networks import networks

SMALL = 50_000_000  # bytes of an arena that a mutated file may ask for here


def small_networks() -> list[IntegerGraph]:
    """Every kind of step, several outputs, one with an order."""
    return [
        residual_network((1, 12, 12), normalization=((0.5,), (0.25,))), GRAPHS["squeeze"](), GRAPHS["pyramid"](),
        GRAPHS["anywhere"](), GRAPHS["joined_twice"](), GRAPHS["shuffle"](),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    paths = []
    for index, graph in enumerate(small_networks()):
        paths.append(tmp_path_factory.mktemp("network") / f"small{index}.safetensors")
        engine.save_graph(graph, paths[-1])
    return paths


@pytest.fixture
def file(files: list[Path]) -> Path:
    return files[0]


def check_written(graph: IntegerGraph, folder: Path) -> None:
    """The network in a file is the network, and its file the same bytes again."""
    engine.save_graph(graph, folder / "a.safetensors")
    loaded = engine.load_graph(folder / "a.safetensors")
    images = torch.randn(2, *graph.input_shape)
    expected, found = reference_values(graph, images), reference_values(loaded, images)
    assert expected.keys() == found.keys() and not same(found, expected)
    for key in ("input_shape", "bounds", "grids", "normalization", "structure"):
        assert getattr(loaded, key) == getattr(graph, key), key
    for mine, theirs in zip(graph.outputs, loaded.outputs, strict=True):
        assert (mine.value, mine.shape, mine.function, mine.axis) == (
            theirs.value, theirs.shape, theirs.function, theirs.axis,
        )  # fmt: skip
        assert mine.order is None if theirs.order is None else torch.equal(mine.order, theirs.order)
    engine.save_graph(loaded, folder / "b.safetensors")
    assert (folder / "a.safetensors").read_bytes() == (folder / "b.safetensors").read_bytes()


@pytest.mark.parametrize("name", GRAPHS)
def test_what_is_written_is_read(name: str, tmp_path: Path) -> None:
    check_written(GRAPHS[name](), tmp_path)


@settings(max_examples=60, deadline=None)
@given(graph=networks())
def test_networks_of_any_shape_are_written(graph: IntegerGraph, tmp_path_factory: pytest.TempPathFactory) -> None:
    check_written(graph, tmp_path_factory.mktemp("any"))


def runs_or_is_refused(path: Path) -> bool:
    """Whether the file is read; then it must run, on both backends alike."""
    try:
        graph = engine.load_graph(path)
    except CheckpointError as error:
        assert "\n" not in str(error)
        return False
    shapes = check_graph(graph)
    _, arena = plan_memory(graph, fuse(graph, shapes), shapes)
    if arena < SMALL and extension.missing("cpu") is None:
        images = torch.randn(1, *graph.input_shape)
        assert not same(NativeNetwork(graph)(images), reference_values(graph, images))
    return True


def test_truncated_files_are_refused(file: Path, tmp_path: Path) -> None:
    data, cut = file.read_bytes(), tmp_path / "cut.safetensors"
    for size in (0, 1, 7, 8, 9, 100, len(data) // 2, len(data) - 1):
        cut.write_bytes(data[:size])
        with pytest.raises(CheckpointError, match="engine: .*cut.safetensors (is damaged|cannot be read)"):
            engine.load_graph(cut)


def test_flipped_bytes_crash_nothing(files: list[Path], tmp_path: Path) -> None:
    draws, found = random.Random(SEED), []
    for index in range(600):
        changed = bytearray(files[index % len(files)].read_bytes())
        for _ in range(draws.choice([1, 1, 3])):
            changed[draws.randrange(len(changed))] = draws.randrange(256)
        (tmp_path / "flipped.safetensors").write_bytes(bytes(changed))
        found.append(runs_or_is_refused(tmp_path / "flipped.safetensors"))
    assert True in found and False in found  # a weight may be another one; a header may not


HOSTILE = st.sampled_from([
    None, True, -1, 0, 3, 2**31, 2**63, 10**400, 1e308, -0.5, "", "x", "images", "logits", "relu6", "\ud800", [], [1],
    [0, 0], [-1, -1], [2**40, 2**40], [[]], {}, {"kind": "layer"}, "v1", ["v1"], ["v1", "v2"], "hardtanh(-1,1)",
    "leaky_relu(inf)", "hardswish", [8, 1, 1], [1, 65536, 65536], {"a": 0}, [0], "softmax", "move", "table",
])  # fmt: skip


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place of a tree of JSON."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else []
    return [path, *(place for key, item in inner for place in leaves(item, (*path, key)))]


@settings(max_examples=600, deadline=None)
@given(data=st.data())
def test_hostile_structures_crash_nothing(files: list[Path], tmp_path_factory: pytest.TempPathFactory, data) -> None:
    with safe_open(data.draw(st.sampled_from(files)), framework="pt") as opened:
        metadata = opened.metadata()
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    structure = json.loads(metadata[KEY])
    places = leaves(structure)
    for _ in range(data.draw(st.integers(1, 2))):
        place = data.draw(st.sampled_from(places))
        target, value = structure, copy.deepcopy(data.draw(HOSTILE))
        try:
            for key in place[:-1]:
                target = target[key]
            if place:
                target[place[-1]] = value
        except (LookupError, TypeError):
            continue  # the first change has taken this place away
    written = save(tensors, metadata={KEY: json.dumps(structure)})
    path = tmp_path_factory.mktemp("hostile") / "hostile.safetensors"
    path.write_bytes(written)
    runs_or_is_refused(path)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_hostile_tensors_crash_nothing(files: list[Path], tmp_path_factory: pytest.TempPathFactory, data) -> None:
    """Integers beyond their range, numbers that are none, other lengths and types."""
    with safe_open(data.draw(st.sampled_from(files)), framework="pt") as opened:
        metadata = opened.metadata()
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    name = data.draw(st.sampled_from(sorted(tensors)))
    tensor = tensors[name].clone()
    kind = data.draw(st.sampled_from(["one", "all", "shorter", "longer", "dtype", "gone"]))
    places = tensor.view(-1)
    limits = [0, 1, -1, 127, 255, 2**15, 2**31 - 1, -(2**31)]
    if kind in ("one", "all") and not tensor.is_floating_point():
        known = torch.iinfo(tensor.dtype)
        value: float = min(max(data.draw(st.sampled_from(limits)), known.min), known.max)
    else:
        value = data.draw(st.sampled_from([0.0, -1.0, 2.0, 2.0**39, 2.0**63, float("inf"), float("nan"), 1e-45]))
    if kind == "one":
        places[data.draw(st.integers(0, len(places) - 1))] = value
    elif kind == "all":
        tensor.fill_(value)
    elif kind == "gone":
        del tensors[name]
    else:
        changes = {
            "shorter": lambda: tensor[:-1].clone(),
            "longer": lambda: torch.cat([tensor, tensor]),
            "dtype": tensor.double,
        }
        tensor = changes[kind]()
    tensors |= {} if kind == "gone" else {name: tensor}
    path = tmp_path_factory.mktemp("hostile") / "hostile.safetensors"
    path.write_bytes(save(tensors, metadata=metadata))
    runs_or_is_refused(path)


def test_other_files_are_refused(file: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"engine: .*none.safetensors cannot be read: "):
        engine.load(tmp_path / "none.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "weights.safetensors")
    with pytest.raises(CheckpointError, match="must be an exported integer network, got another file"):
        engine.load(tmp_path / "weights.safetensors")
    torch.save({"a": torch.zeros(1)}, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match="is damaged"):
        engine.load(tmp_path / "weights.pt")
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    newer = {KEY: json.dumps(json.loads(metadata[KEY]) | {"version": 1})}
    save_file(tensors, tmp_path / "new.safetensors", metadata=newer)
    with pytest.raises(CheckpointError, match="must be of version 2, got 1"):
        engine.load(tmp_path / "new.safetensors")
    save_file({**tensors, "more": torch.zeros(1)}, tmp_path / "more.safetensors", metadata=metadata)
    with pytest.raises(CheckpointError, match="every tensor must be of a step or an output, got more"):
        engine.load(tmp_path / "more.safetensors")


# --- packing ------------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(bits=st.sampled_from([2, 4, 8]), size=st.integers(0, 70), signed=st.booleans(), seed=st.integers(0, 2**31))
def test_packed_integers_come_back(bits: int, size: int, signed: bool, seed: int) -> None:
    low = -(2 ** (bits - 1)) if signed else 0
    q = torch.randint(low, low + 2**bits, (size,), generator=torch.Generator().manual_seed(seed))
    packed = pack_bits(q, bits)
    assert packed.dtype == torch.uint8 and len(packed) == -(-size * bits // 8)
    found = unpack_bits(packed, bits, size, signed=signed)
    assert found.dtype == (torch.int8 if signed else torch.uint8) and torch.equal(found.long(), q)


def test_the_first_integer_lies_in_the_lowest_bits() -> None:
    assert pack_bits(torch.tensor([1, -1, 0, -2, 1]), 2).tolist() == [0b10_00_11_01, 1]
    assert pack_bits(torch.tensor([7, -8]), 4).tolist() == [0b1000_0111]


def test_wrong_integers_are_not_packed() -> None:
    for call, text in (
        (lambda: pack_bits(torch.tensor([1]), 3), "pack_bits: bits must be 8, 4 or 2, got 3"),
        (lambda: pack_bits(torch.tensor([16]), 4), r"pack_bits: q must be in \[-8, 15\], got 16 to 16"),
        (lambda: pack_bits(torch.tensor([1.0]), 4), "pack_bits: q must be of an integer dtype, got torch.float32"),
        (lambda: unpack_bits(torch.zeros(2, dtype=torch.uint8), 4, 5, signed=True), r"size must be in \[0, 4\], got 5"),
        (lambda: unpack_bits(torch.zeros(2), 4, 1, signed=True), "packed must be uint8 and flat, got torch.float32"),
    ):
        with pytest.raises(ValueError, match=text):
            call()
