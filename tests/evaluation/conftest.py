"""Runs for workers and reports: with many checkpoints made of the few of a real one, and scored in full."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import yaml

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


N_PARCELS = 20


def write_atlas(path: Path, n_parcels: int = N_PARCELS) -> None:
    """A volume of the brain's size in MNI space in which parcels are slabs."""
    nibabel = pytest.importorskip("nibabel", reason="nibabel is missing (the extra [brain])")
    ids = np.zeros((46, 55, 46), np.int16)
    inside = ids[8:38, 8:48, 8:38]
    inside[:] = 1 + (np.arange(inside.shape[1]) * n_parcels // inside.shape[1])[None, :, None]
    affine = np.diag([4.0, 4.0, 4.0, 1.0])
    affine[:3, 3] = (-90, -126, -72)
    nibabel.save(nibabel.Nifti1Image(ids, affine), path)


def copy_run(source: Path, target: Path, **evaluate: object) -> Path:
    """A copy of a run without its checkpoints, with other keys in the `evaluate` section of its configuration."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.png", "checkpoints", "predictions"))
    for path in target.glob("stage*/config.yaml"):
        config = yaml.safe_load(path.read_text())
        config["evaluate"] |= evaluate
        path.write_text(yaml.safe_dump(config))
    return target


@pytest.fixture(scope="session")
def labels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A label file in which half of the parcels are visual."""
    path = tmp_path_factory.mktemp("labels") / "labels.txt"
    names = [
        f"{i + 1} 7Networks_LH_{'Vis' if i < N_PARCELS // 2 else 'Default'}_{i + 1} 0 0 0 0" for i in range(N_PARCELS)
    ]
    path.write_text("\n".join(names))
    return path


@pytest.fixture(scope="session")
def full_run(debug_run: Path, labels: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny finished run, scored in full; tests must not write into it."""
    from trainer.cli import main

    run = tmp_path_factory.mktemp("full") / "run"
    shutil.copytree(debug_run, run, ignore=shutil.ignore_patterns("*.png"))
    for path in run.glob("stage*/config.yaml"):
        config = yaml.safe_load(path.read_text())
        config["evaluate"] |= {"samples": 4, "bootstrap": 50, "labels": str(labels)}
        path.write_text(yaml.safe_dump(config))
    assert main(["evaluate", str(run)]) == 0
    return run
