"""What the loop saves and what it goes on from: never a ruined state, never somebody else's."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import dfq
from dfq.running.checkpoint import CheckpointError, load_tree, save_tree
from dfq.running.loop import NonFiniteError, run_loop
from dfq.running.run_folder import RunFolder
from dfq_kernels import BackendError
from tests.conftest import SMALL_RECIPE, SmallNet, small_net


class Ruined:
    """Its losses are finite; the update of step `at` is not."""

    total_steps = 3

    def __init__(self, at: int) -> None:
        self.at, self.weight = at, torch.zeros(2)

    def phase(self, index: int) -> str:
        return "phase"

    def step(self, index: int) -> dict[str, torch.Tensor]:
        self.weight = torch.full((2,), math.inf if index == self.at else float(index))
        return {"loss": torch.tensor(1.0)}

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"layers": [{"weight": self.weight}], "range": torch.tensor(math.inf)}  # one that has seen nothing

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.weight = state["layers"][0]["weight"]


@pytest.mark.parametrize(
    ("at", "what"), [(0, "nothing is saved, begin again in another folder than"), (2, "the last checkpoint is in")]
)
def test_a_ruined_state_is_never_saved(tmp_path: Path, at: int, what: str) -> None:
    with RunFolder(tmp_path / "run", {"command": "test"}, resume=False) as folder:
        with pytest.raises(
            NonFiniteError, match=rf"layers/0/weight must be finite, got .* after step {at + 1}; .*{what}"
        ):
            run_loop(Ruined(at), folder, resume=False, save_seconds=0.0)
        assert folder.checkpoint.exists() == (at > 0)
        if at:
            assert load_tree(folder.checkpoint)["task"]["layers"][0]["weight"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda tree: tree.pop("next_step"), "KeyError"),
        (lambda tree: tree.update(next_step="7"), "next_step must be in"),
        (lambda tree: tree.update(next_step=10**6), "next_step must be in"),
        (lambda tree: tree["task"].pop("students"), "KeyError"),
        (lambda tree: tree["task"]["generators"].pop(), "ValueError"),
        (lambda tree: tree["task"]["students"][0].popitem(), "RuntimeError"),
        (lambda tree: tree["task"]["rungs"]["calibrated"].popitem(), "RuntimeError"),
        (lambda tree: tree["task"]["students"][0]["conv1.weight"].fill_(math.nan), "students/0/conv1.weight has NaN"),
        (lambda tree: tree["task"].update(rungs=[1]), "AttributeError"),
    ],
)  # fmt: skip
def test_a_damaged_checkpoint_is_one_line_and_stays_as_it_was(run_small, tmp_path: Path, change, text: str) -> None:
    run_small()
    path = tmp_path / "run" / "checkpoint.safetensors"
    tree = load_tree(path)
    change(tree)
    save_tree(path, tree)
    before = path.read_bytes(), (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match=f"must be of this run, got a damaged one .*{text}") as caught:
        run_small(resume=True)
    assert "\n" not in str(caught.value)
    assert before == (path.read_bytes(), (tmp_path / "run" / "metrics.jsonl").read_bytes())


def test_a_run_leaves_the_caller_s_random_numbers_alone(run_small) -> None:
    before = torch.get_rng_state()
    run_small()
    assert torch.equal(torch.get_rng_state(), before)


def test_an_infinite_mask_of_a_student_is_no_ruin(tmp_path: Path) -> None:
    class Masked(SmallNet):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.tensor([0.0, -math.inf]))

    dfq.distill(small_net(), [Masked()], input_shape=(1, 12, 12), num_classes=4, recipe=SMALL_RECIPE, steps=1,
                out=tmp_path / "run")  # fmt: skip


def test_the_missing_backend_is_named_before_the_folder_is_made(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("dfq_kernels.dispatch._FOR_ALL", "nonsense")
    settings = {"input_shape": (1, 12, 12), "num_classes": 4, "recipe": SMALL_RECIPE, "out": tmp_path / "run"}
    with pytest.raises(BackendError, match="nonsense"):
        dfq.distill(small_net(), [small_net()], **settings)
    with pytest.raises(BackendError, match="nonsense"):
        dfq.quantize(small_net(), **settings)
    assert not (tmp_path / "run").exists()
