"""Runs with many checkpoints, made of the few of a real one, and workers in a hurry."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from trainer.evaluation import held, lifetime
from trainer.run import checkpoint, claims
from trainer.run.directory import RunDirectory

HURRY = {
    lifetime: {"POLL_EVERY_S": 0.05, "LOOK_EVERY_S": 0.1, "STALE_AFTER_S": 1.0, "BEGIN_WITHIN_S": 2.0},
    held: {"SETTLE_S": 0.3},
    claims: {"BEAT_EVERY_S": 0.05, "STALE_AFTER_S": 1.0},
}


@pytest.fixture
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits of seconds become waits of moments."""
    for module, values in HURRY.items():
        for name, value in values.items():
            monkeypatch.setattr(module, name, value)


@pytest.fixture
def crowd(debug_run: Path, tmp_path: Path) -> RunDirectory:
    """A finished run of stage 1 with 30 checkpoints, of which none is scored."""
    return make_crowd(debug_run, tmp_path / "crowd", range(1, 31))


def make_crowd(source: Path, target: Path, steps: Sequence[int]) -> RunDirectory:
    """Stage 1 of a run with copies of its last checkpoint under other steps, and without scores."""
    stage = target / "stage1"
    keep = shutil.ignore_patterns("checkpoints", "scores", "logs", "claims")
    shutil.copytree(source / "stage1", stage, ignore=keep)
    last = checkpoint.steps(source / "stage1" / "checkpoints")[-1]
    for step in steps:
        add_checkpoint(checkpoint.folder_of(source / "stage1" / "checkpoints", last), stage / "checkpoints", step)
    return RunDirectory(target)


def add_checkpoint(source: Path, checkpoints: Path, step: int) -> Path:
    """A copy of a checkpoint under another step, appearing whole."""
    aside, final = checkpoints / f".copy.{step}", checkpoint.folder_of(checkpoints, step)
    shutil.copytree(source, aside, copy_function=shutil.copyfile)
    meta = json.loads((aside / "meta.json").read_text())
    (aside / "meta.json").write_text(json.dumps({**meta, "step": step}))
    aside.rename(final)
    return final
