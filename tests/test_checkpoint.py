"""Files: atomic, readable again, never unpickled; one line for whatever is wrong with them."""

from __future__ import annotations

import errno
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dfq.running.checkpoint import CheckpointError, load_tree, load_weights, save_tree, save_weights, write_atomic
from tests.conftest import small_net

TREE = {
    "step": 3, "rate": 0.1, "name": "x", "none": None, "flag": True, 7: "a key that is a number",
    "nested": [{"w": torch.arange(6.0).reshape(2, 3)}, (torch.tensor(5), [])], "empty": torch.zeros(0, 3),
}  # fmt: skip


def test_trees_come_back(tmp_path: Path) -> None:
    save_tree(tmp_path / "t.safetensors", TREE)
    loaded = load_tree(tmp_path / "t.safetensors")
    assert list(loaded) == list(TREE) and loaded["nested"][1][1] == [] and isinstance(loaded["nested"][1], tuple)
    assert torch.equal(loaded["nested"][0]["w"], TREE["nested"][0]["w"]) and loaded["empty"].shape == (0, 3)
    assert {key: loaded[key] for key in ("step", "rate", "name", "none", "flag", 7)} == {
        key: TREE[key] for key in ("step", "rate", "name", "none", "flag", 7)
    }


def test_values_that_are_not_plain_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="a value at /model must be a tensor or JSON, got SmallNet"):
        save_tree(tmp_path / "t.safetensors", {"model": small_net()})
    assert not list(tmp_path.iterdir())


def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t.safetensors"
    save_tree(path, {"step": 1})

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="t.safetensors cannot be written: No space left on device"):
        save_tree(path, {"step": 2})
    monkeypatch.undo()
    assert load_tree(path) == {"step": 1} and [item.name for item in tmp_path.iterdir()] == ["t.safetensors"]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written: Not a directory|cannot be written: File exists"):
        write_atomic(tmp_path / "file" / "x", b"")


@pytest.mark.parametrize("keep", [0, 4, 40, -8])
def test_truncated_trees_are_errors(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "t.safetensors"
    save_tree(path, TREE)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="cannot be read") as error:
        load_tree(path)
    assert "\n" not in str(error.value)


def test_missing_files_and_foreign_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_tree(tmp_path / "nothing")
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_tree(tmp_path / "foreign.safetensors")


@pytest.mark.parametrize("wrapping", ["none", "state_dict", "model"])
def test_torch_checkpoints_in_their_usual_wrappings(tmp_path: Path, wrapping: str) -> None:
    net, other = small_net(), small_net()
    with torch.no_grad():
        net.fc.weight.add_(1)
    state = {f"module.{name}" if wrapping == "model" else name: value for name, value in net.state_dict().items()}
    torch.save(state if wrapping == "none" else {wrapping: state}, tmp_path / "net.pth")
    load_weights(other, tmp_path / "net.pth")
    assert torch.equal(net.fc.weight, other.fc.weight)


def test_weights_come_back_and_metadata_is_kept(tmp_path: Path) -> None:
    net, other = small_net(), small_net()
    with torch.no_grad():
        net.fc.weight.add_(1)
    save_weights(net, tmp_path / "net.safetensors")
    load_weights(other, tmp_path / "net.safetensors")
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in net.state_dict().items())


class Exploit:
    def __reduce__(self):
        return os.system, ("touch exploited",)


def test_a_hostile_pickle_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for data in (pickle.dumps(Exploit()), pickle.dumps({"state_dict": Exploit()})):
        (tmp_path / "net.pth").write_bytes(data)
        with pytest.raises(CheckpointError, match="cannot be read"):
            load_weights(small_net(), tmp_path / "net.pth")
    torch.save({"fc.weight": Exploit()}, tmp_path / "net.pth")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_weights(small_net(), tmp_path / "net.pth")
    assert not (tmp_path / "exploited").exists()


def broken(net: torch.nn.Module, what: str) -> dict[str, torch.Tensor]:
    state = {name: value.clone() for name, value in net.state_dict().items()}
    if what == "missing":
        del state["fc.bias"]
    elif what == "extra":
        state["other"] = torch.zeros(1)
    elif what == "shape":
        state["fc.weight"] = torch.zeros(9, 9)
    elif what == "nan":
        state["conv1.weight"][0, 0, 0, 0] = float("nan")
    return state


@pytest.mark.parametrize(
    ("what", "text"),
    [("missing", "got none of 'fc.bias'"), ("extra", "no other tensors than the model's, got 'other'"),
     ("shape", r"fc.weight in .* must have shape \(4, 8\), got \(9, 9\)"),
     ("nan", "conv1.weight in .* must be finite")],
)  # fmt: skip
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_weights_of_another_model(tmp_path: Path, what: str, text: str, suffix: str) -> None:
    path = tmp_path / f"net{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(broken(small_net(), what), path)
    net = small_net()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(CheckpointError, match=text):
        load_weights(net, path)
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in before.items())


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_truncated_and_missing_weights(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"net{suffix}"
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        load_weights(small_net(), path)
    (save_file if suffix == ".safetensors" else torch.save)(small_net().state_dict(), path)
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(CheckpointError, match="cannot be read") as error:
        load_weights(small_net(), path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("write", "text"),
    [(lambda path: torch.save(small_net(), path), r"got one with tests\.conftest\.SmallNet in it"),
     (lambda path: path.write_bytes(b""), "an empty or a truncated one"),
     (lambda path: path.write_text("hello"), "a file of another kind"),
     (lambda path: torch.jit.save(torch.jit.script(small_net()), str(path)), "got a TorchScript archive")],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_is_no_state_dict_is_named_without_advice_to_unpickle(tmp_path: Path, write, text: str) -> None:
    write(tmp_path / "net.pth")
    with pytest.raises(CheckpointError, match=text) as error:
        load_weights(small_net(), tmp_path / "net.pth")
    assert not any(word in str(error.value) for word in ("weights_only", "\n", "\x1b"))


@pytest.mark.parametrize(
    ("change", "text"),
    [(lambda state: state.update({0: torch.zeros(1)}), "must hold a state dict of tensors"),
     (lambda state: state.update({"fc.bias": torch.zeros(4, dtype=torch.int8)}), "of torch.float32, got torch.int8"),
     (lambda state: state.update({"fc.bias": torch.zeros(4, dtype=torch.cfloat)}), "got torch.complex64"),
     (lambda state: state.update({"fc.bias": torch.zeros(4, dtype=torch.float8_e4m3fn)}), "got torch.float8"),
     (lambda state: state.update({"fc.bias": torch.zeros(4, device="meta")}), "must hold its values"),
     (lambda state: state.update({"fc.bias": torch.zeros(4).to_sparse()}), "must hold its values")],
)  # fmt: skip
def test_tensors_that_are_no_weights_are_refused(tmp_path: Path, change, text: str) -> None:
    state = dict(small_net().state_dict())
    change(state)
    torch.save(state, tmp_path / "net.pth")
    with pytest.raises(CheckpointError, match=text):
        load_weights(small_net(), tmp_path / "net.pth")
