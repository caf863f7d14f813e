"""Checkpoints appear whole, are noticed when damaged, and the latest and best follow from what lies there."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import resource
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from trainer.errors import InputError
from trainer.run import checkpoint
from trainer.run.checkpoint import Checkpoint, Writer


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


def test_the_moving_average_is_what_predicts_and_not_what_is_resumed(tmp_path: Path) -> None:
    content = some(1.0)
    content.ema["a.weight"] = torch.full((3, 2), 9.0)  # buffers have none
    folder = checkpoint.save(tmp_path, 5, content)
    whole, predicts = checkpoint.load(folder), checkpoint.load(folder, weights_only=True)
    assert (float(whole.model["a.weight"][0, 0]), float(whole.ema["a.weight"][0, 0])) == (1.0, 9.0)
    assert (float(predicts.model["a.weight"][0, 0]), predicts.ema, predicts.moments) == (9.0, {}, {})
    assert torch.equal(predicts.model["b"], torch.arange(4.0))
    checkpoint.copy_weights(folder, tmp_path / "copy")
    assert float(checkpoint.load(tmp_path / "copy", weights_only=True).model["a.weight"][0, 0]) == 9.0


def test_tensors_that_share_memory_or_are_transposed_are_stored_and_others_are_not_copied() -> None:
    tied, plain = torch.arange(6.0).reshape(2, 3), torch.ones(2)
    stored = checkpoint._storable({"a": tied, "b": tied, "c": tied.T, "d": plain, "e": torch.empty(0)})
    assert torch.equal(stored["b"], tied)
    assert torch.equal(stored["c"], tied.T)
    assert stored["c"].is_contiguous()
    assert stored["b"].data_ptr() != stored["a"].data_ptr() == tied.data_ptr()
    assert stored["d"].data_ptr() == plain.data_ptr()


def test_a_write_that_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path, 5, some(1.0))
    monkeypatch.setattr(checkpoint, "sha256", lambda path: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(InputError, match=r"step_00000006: cannot be written: .*No space left.*continue with --resume"):
        checkpoint.save(tmp_path, 6, some(1.0))
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000005"]


def on_a_full_disk(action: Callable[[], str]) -> str:
    """What an action gives in a process of its own whose disk takes 2000 bytes a file, and no more."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        try:
            os.write(writing, action().encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as file:
        answer = file.read()
    os.waitpid(child, 0)
    return answer


@pytest.mark.parametrize("background", [True, False])
def test_on_a_full_disk_the_training_goes_on_without_a_checkpoint_that_nobody_needs(
    tmp_path: Path, background: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    large = Checkpoint({"a": torch.zeros(1000)}, {}, {})

    def train() -> str:
        writer = Writer(background=background)
        writer.write(tmp_path, 5, some(1.0), needed=False)
        writer.write(tmp_path, 6, large, needed=False)
        writer.wait()
        try:
            writer.write(tmp_path, 7, large, needed=True)
            writer.wait()
        except InputError as error:
            return str(error)
        return "no error"

    error = on_a_full_disk(train)
    assert "step_00000007: cannot be written: " in error
    assert "File too large" in error
    warning = capfd.readouterr().err
    assert warning.count("\n") == 1
    assert warning.startswith("warning: the training goes on without a checkpoint: ")
    assert "step_00000006" in warning
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000005"]
    assert checkpoint.load(tmp_path / "step_00000005").meta["step"] == 5


def test_a_step_does_not_wait_for_the_disk_but_the_next_checkpoint_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = threading.Event()
    save = checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda *given: disk.wait(10) and save(*given))
    writer = Writer(background=True)
    writer.write(tmp_path, 5, some(1.0), needed=True)
    assert checkpoint.steps(tmp_path) == []  # we are here, and it is not
    threading.Timer(0.05, disk.set).start()
    writer.write(tmp_path, 6, some(2.0), needed=True)
    assert 5 in checkpoint.steps(tmp_path)
    writer.wait()
    assert checkpoint.steps(tmp_path) == [5, 6]


def test_a_mistake_of_ours_does_not_end_with_the_thread(tmp_path: Path) -> None:
    writer = Writer(background=True)
    writer.write(tmp_path, 5, Checkpoint({"a": "no tensor"}, {}, {}), needed=False)  # type: ignore[dict-item]
    with pytest.raises(AttributeError):
        writer.wait()
    writer.wait()


def test_what_killed_writers_left_is_swept(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 5, some(1.0))
    checkpoint.save(tmp_path, 6, some(1.0)).rename(tmp_path / ".step_00000006.old.99")  # killed while it replaced it
    for left in (".step_00000005.old.99", ".step_00000006.99", ".step_00000004.doomed.x"):
        (tmp_path / left).mkdir()
    checkpoint.sweep(tmp_path)
    checkpoint.sweep(tmp_path / "nowhere")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000005", "step_00000006"]
    assert checkpoint.load(tmp_path / "step_00000006").meta["step"] == 6


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "ema.safetensors"])
@pytest.mark.parametrize("dump", [pickle.dump, torch.save])
def test_a_pickle_in_a_checkpoint_is_refused_and_does_not_run(
    tmp_path: Path, name: str, dump: Callable[..., None]
) -> None:
    content = some(1.0)
    content.ema["b"] = torch.zeros(4)
    folder = checkpoint.save(tmp_path, 5, content)
    with (folder / name).open("wb") as file:
        dump({"a.weight": Malicious(tmp_path / "it ran")}, file)
    meta = json.loads((folder / "meta.json").read_text())
    meta["sha256"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()  # whoever alters it says so
    (folder / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(InputError, match=rf"{name}: no safetensors file: found ."):
        checkpoint.load(folder)
    said: list[str] = []
    assert checkpoint.newest_whole(tmp_path, said.append) is None
    assert len(said) == 1
    assert not (tmp_path / "it ran").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "ema.safetensors", "meta.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_checkpoint_is_named_and_passed_over(tmp_path: Path, name: str, damage: str) -> None:
    checkpoint.save(tmp_path, 5, some(1.0))
    newest = some(2.0)
    newest.ema["b"] = torch.zeros(4)
    path = checkpoint.save(tmp_path, 6, newest) / name
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


def test_a_checkpoint_that_the_file_system_keeps_is_left_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a share of Windows does while a worker reads it, or a sticky folder of another user's."""
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, some(1.0))
    real = Path.rename

    def busy(path: Path, target: Path) -> Path:
        if path.name == "step_00000001":
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(path))
        return real(path, target)

    monkeypatch.setattr(Path, "rename", busy)
    for _ in range(2):
        checkpoint.prune(tmp_path, keep_last=1, keep=[])
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step_00000001", "step_00000003"]
    said = capsys.readouterr().err
    assert said == f"warning: {tmp_path}/step_00000001 cannot be deleted: Device or resource busy\n"


def test_a_reader_of_a_checkpoint_that_is_pruned_reads_on_and_a_writer_is_left_alone(tmp_path: Path) -> None:
    for step in (1, 2):
        checkpoint.save(tmp_path, step, some(step))
    (tmp_path / ".step_00000003.99").mkdir()
    with safe_open(tmp_path / "step_00000001" / "model.safetensors", "pt") as file:
        checkpoint.prune(tmp_path, keep_last=1, keep=[])
        assert torch.equal(file.get_tensor("a.weight"), torch.ones(3, 2))
    assert sorted(path.name for path in tmp_path.iterdir()) == [".step_00000003.99", "step_00000002"]
    with pytest.raises(InputError, match=r"step_00000001/meta\.json: no whole checkpoint"):
        checkpoint.load(tmp_path / "step_00000001")


def test_pruning_does_not_stumble_over_one_that_is_being_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.save(tmp_path, 2, some(2.0))
    monkeypatch.setattr(checkpoint, "steps", lambda _: [1, 2])  # 1 was seen, and is gone for a moment
    checkpoint.prune(tmp_path, keep_last=1, keep=[])
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000002"]


def test_copied_weights_can_be_read_without_moments(tmp_path: Path) -> None:
    source = checkpoint.save(tmp_path / "from", 5, some(1.0))
    checkpoint.copy_weights(source, tmp_path / "to")
    assert checkpoint.load(tmp_path / "to", weights_only=True).meta["step"] == 5
    with pytest.raises(InputError, match=r"optimizer\.safetensors: missing"):
        checkpoint.load(tmp_path / "to")


@pytest.mark.parametrize(
    ("score", "expected"),
    [
        ({"pearson_r": 0.3}, 0.3),
        ({"pearson_r": 0.3, "untrained_subjects": ["2"], "per_subject": {"1": 0.4, "2": 0.0, "3": 0.5}}, 0.45),
        ({"pearson_r": None, "untrained_subjects": ["2"], "per_subject": {"1": 0.4, "2": None}}, 0.4),
        ({"pearson_r": None, "untrained_subjects": ["2"], "per_subject": {"1": None, "2": 0.4}}, None),
        ({"pearson_r": 0.4, "untrained_subjects": ["2"], "per_subject": {"2": 0.4}}, None),
        ({"pearson_r": 0.4, "untrained_subjects": ["2"], "per_subject": {"2": 0.4}, "flow_loss": 1.5}, -1.5),
    ],
)
def test_subjects_who_are_not_trained_have_no_say_in_the_quality(score: dict[str, Any], expected: float | None) -> None:
    assert checkpoint.quality(score) == (None if expected is None else pytest.approx(expected))
