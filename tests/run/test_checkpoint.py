"""Checkpoints appear whole, are noticed when damaged, and the latest and best follow from what lies there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from trainer.errors import InputError
from trainer.run import checkpoint
from trainer.run.checkpoint import Checkpoint


def some(value: float) -> Checkpoint:
    weights = {"a.weight": torch.full((3, 2), value), "b": torch.arange(4.0)}
    return Checkpoint(weights, {"exp_avg.b": torch.ones(4) * value}, {"epoch": 2})


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    folder = checkpoint.save(tmp_path, 500, some(0.5))
    assert folder.name == "step_00000500"
    found = checkpoint.load(folder)
    assert torch.equal(found.model["a.weight"], torch.full((3, 2), 0.5))
    assert torch.equal(found.moments["exp_avg.b"], torch.ones(4) * 0.5)
    assert (found.meta["step"], found.meta["epoch"]) == (500, 2)
    assert set(found.meta["sha256"]) == {"model.safetensors", "optimizer.safetensors"}


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 5, some(1.0))
    checkpoint.save(tmp_path, 5, some(2.0))
    assert checkpoint.load(checkpoint.folder_of(tmp_path, 5)).model["a.weight"][0, 0] == 2.0
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000005"]


def test_a_write_that_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path, 5, some(1.0))
    monkeypatch.setattr(checkpoint, "sha256", lambda path: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(InputError, match=r"step_00000006: cannot be written: .*No space left.*continue with --resume"):
        checkpoint.save(tmp_path, 6, some(1.0))
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000005"]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "meta.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_checkpoint_is_named_and_passed_over(tmp_path: Path, name: str, damage: str) -> None:
    checkpoint.save(tmp_path, 5, some(1.0))
    path = checkpoint.save(tmp_path, 6, some(2.0)) / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 0xFF  # of a tensor, not of the header, which would not parse
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(content if damage == "flip" else content[:-7])
    said: list[str] = []
    found = checkpoint.newest_whole(tmp_path, said.append)
    assert found is not None
    assert found.meta["step"] == 5
    assert len(said) == 1
    assert "step_00000006" in said[0]


def test_a_folder_that_is_being_written_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / ".step_00000007.123").mkdir()
    assert checkpoint.steps(tmp_path) == []
    assert checkpoint.newest_whole(tmp_path, print) is None
    assert checkpoint.steps(tmp_path / "nowhere") == []


def test_another_format_is_refused(tmp_path: Path) -> None:
    meta = checkpoint.save(tmp_path, 5, some(1.0)) / "meta.json"
    meta.write_text(meta.read_text().replace('"format": 1', '"format": 99'))
    with pytest.raises(InputError, match="found 99, expected 1"):
        checkpoint.load(meta.parent)


def test_best_is_the_highest_r_on_the_set_and_the_earliest_of_equals() -> None:
    def score(step: int, r: float | None, name: str = "val", estimate: str = "mean") -> dict:
        return {"step": step, "pearson_r": r, "set": name, "estimate": estimate, "validation": True}

    scores = [score(3, 0.2), score(2, 0.2), score(1, 0.1), score(4, 0.9, "test"), score(5, 0.8, "val", "sample")]
    assert checkpoint.best_step(scores, "val") == 2
    assert checkpoint.best_step([score(1, None)], "val") is None


def test_stage_2_is_chosen_by_its_loss_on_unseen_runs() -> None:
    scores = [
        {"step": step, "set": "val", "estimate": "mean", "pearson_r": r, "flow_loss": loss, "validation": True}
        for step, r, loss in ((1, 0.3, 1.5), (2, 0.2, 1.2), (3, 0.1, None), (4, 0.4, 1.3))
    ]
    assert checkpoint.best_step(scores, "val") == 2
    assert checkpoint.qualities(scores, "val") == {1: -1.5, 2: -1.2, 4: -1.3}


def test_pruning_keeps_the_newest_and_the_named(tmp_path: Path) -> None:
    for step in range(1, 7):
        checkpoint.save(tmp_path, step, some(step))
    checkpoint.prune(tmp_path, keep_last=2, keep=[1, None])
    assert checkpoint.steps(tmp_path) == [1, 5, 6]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000001", "step_00000005", "step_00000006"]


def test_copied_weights_can_be_read_without_moments(tmp_path: Path) -> None:
    source = checkpoint.save(tmp_path / "from", 5, some(1.0))
    checkpoint.copy_weights(source, tmp_path / "to")
    assert checkpoint.load(tmp_path / "to", weights_only=True).meta["step"] == 5
    with pytest.raises(InputError, match=r"optimizer\.safetensors: missing"):
        checkpoint.load(tmp_path / "to")
