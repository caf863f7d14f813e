"""A checkpoint that is held is read as it was, whatever becomes of it, with hard links or without."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest
import torch

from tests.permissions import bound_by_modes
from trainer.evaluation.held import hold, let_go
from trainer.run import checkpoint
from trainer.run.checkpoint import Checkpoint


def saved(folder: Path, value: float) -> Path:
    tensors = {"a": torch.full((3,), value)}
    return checkpoint.save(
        folder, 5, Checkpoint(tensors, {"a": torch.zeros(3)}, {"shapes": {}}, {"a": tensors["a"] + 1})
    )


@pytest.fixture(params=[None, errno.EPERM, errno.ENOTSUP, errno.EMLINK], ids=lambda e: errno.errorcode.get(e, "links"))
def links(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the file system has hard links; otherwise with what it refuses them."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(request.param, os.strerror(request.param))

    if request.param is not None:
        monkeypatch.setattr(os, "link", refuse)
    return request.param is None


@pytest.mark.parametrize("how", ["deleted", "replaced"])
def test_it_is_read_as_it_was_when_it_is_deleted_or_replaced(tmp_path: Path, links: bool, how: str) -> None:
    folder = saved(tmp_path, 1.0)
    held = hold(folder, "step_00000005-val")
    assert held is not None
    assert ((held / folder.name / checkpoint.MODEL).stat().st_nlink == 2) == links
    if how == "deleted":
        checkpoint.prune(tmp_path, keep_last=1, keep=[])
        shutil.rmtree(folder)
    else:
        saved(tmp_path, 7.0)
    model = checkpoint.load(checkpoint.folder_of(held, 5), weights_only=True).model
    assert model["a"].tolist() == [2.0] * 3
    assert not (held / folder.name / checkpoint.MOMENTS).exists()
    let_go(held)
    assert [path.name for path in tmp_path.iterdir()] == ([] if how == "deleted" else [folder.name])


def test_one_that_is_gone_is_not_held(tmp_path: Path, links: bool) -> None:
    assert hold(tmp_path / "step_00000005", "step_00000005-val") is None
    assert list(tmp_path.iterdir()) == []


def test_where_nothing_can_be_written_nothing_is_left(tmp_path: Path) -> None:
    folder = saved(tmp_path, 1.0)
    tmp_path.chmod(0o555)
    with bound_by_modes(), pytest.raises(PermissionError, match=str(tmp_path)):
        hold(folder, "step_00000005-val")
    tmp_path.chmod(0o755)
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_a_copy_that_does_not_fit_on_the_disk_is_not_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    folder = saved(tmp_path, 1.0)
    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(OSError, match=rf"No space left on device: '{tmp_path}/\.scored\."):
        hold(folder, "step_00000005-val")
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
