"""An interrupted scoring goes on after the last whole run, and ends with the same bytes as one that was not."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.ranks import on_ranks
from tests.scoring.conftest import make_study
from tests.scoring.test_full import FEW, files_of, score_fully
from tests.scoring.test_score import ALONE, make_checkpoint
from trainer.data.batches import Batch
from trainer.data.study import Study
from trainer.run import checkpoint
from trainer.run.directory import StageDirectory
from trainer.scoring import judge as judging
from trainer.scoring.kept import FOLDER
from trainer.scoring.predictor import Draws, FlowPredictor, Pairs

Strike = Callable[[str, int, int], None]
"""Called before a piece of work: what it is, its run, its subject."""


class Killed(BaseException):
    """In the place of a signal: nothing catches it."""


@pytest.fixture
def few(tiny_shards: Path, debug_config: Path) -> Study:
    return make_few(tiny_shards, debug_config)


def make_few(shards: Path, config: Path, *overrides: str) -> Study:
    """Three runs, the second without the third subject: eleven samplings."""
    study = make_study(shards, config, *FEW, *overrides)
    study.spans["val"] = study.spans["val"][:3]
    return study


@pytest.fixture
def directory(few: Study, tmp_path: Path) -> StageDirectory:
    made = StageDirectory(tmp_path / "run" / "stage2")
    make_checkpoint(made, few, stage=2)
    return made


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, int, int]]]:
    """What is computed, as it is computed: the scores of (run), the samples of (run, subject)."""
    seen: list[tuple[str, int, int]] = []
    watch(monkeypatch, lambda *piece: seen.append(piece))
    yield seen


def watch(monkeypatch: pytest.MonkeyPatch, strike: Strike) -> None:
    """Call `strike` before every piece of work."""
    predict, draws = FlowPredictor.predict, FlowPredictor.draws

    def seen_predict(self: FlowPredictor, batch: Batch) -> Pairs:
        strike("scores", int(batch.windows[0]), -1)
        return predict(self, batch)

    def seen_draws(self: FlowPredictor, batch: Batch, count: int) -> Iterator[Draws]:
        for each in draws(self, batch, count):
            strike("samples", int(batch.windows[0]), each.subject)
            yield each

    monkeypatch.setattr(FlowPredictor, "predict", seen_predict)
    monkeypatch.setattr(FlowPredictor, "draws", seen_draws)


def kill_at(kind: str, run: int, subject: int = -1) -> Strike:
    def strike(*piece: Any) -> None:
        if piece == (kind, run, subject):
            raise Killed

    return strike


def interrupt(directory: StageDirectory, study: Study, strike: Strike, world: int = 1) -> None:
    """Score until `strike` kills the process, or the ranks."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises((Killed, threading.BrokenBarrierError)):
        watch(patch, strike)
        if world == 1:
            score_fully(directory, 2, study, "val")
        else:
            on_ranks(world, lambda rank: score_fully(directory, 2, study, "val", processes=rank))


def whole_scores(study: Study, folder: Path) -> dict[str, bytes]:
    """The files of a scoring that nothing interrupts."""
    directory = StageDirectory(folder / "stage2")
    make_checkpoint(directory, study, stage=2)
    score_fully(directory, 2, study, "val")
    return files_of(directory.scores)


@pytest.mark.parametrize("every_s", [0.0, 1e9], ids=["subject by subject", "run by run"])
def test_a_restart_computes_what_is_missing_and_writes_the_same_bytes(
    few: Study, directory: StageDirectory, tmp_path: Path, every_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judging, "KEEP_EVERY_S", every_s)
    wanted = whole_scores(few, tmp_path / "whole")
    interrupt(directory, few, kill_at("scores", 2))
    interrupt(directory, few, kill_at("samples", 1, 3))
    interrupt(directory, few, kill_at("samples", 2, 2))
    seen: list[tuple[str, int, int]] = []
    watch(monkeypatch, lambda *piece: seen.append(piece))
    score_fully(directory, 2, few, "val")
    assert seen == [("samples", 2, s) for s in ((2, 3) if every_s == 0.0 else (0, 1, 2, 3))]
    assert files_of(directory.scores) == wanted, "and nothing that was kept is left"


@pytest.mark.parametrize(("before", "after"), [(3, 1), (2, 3), (1, 2)])
def test_other_ranks_go_on_with_what_ranks_have_scored(
    few: Study, directory: StageDirectory, tmp_path: Path, before: int, after: int
) -> None:
    wanted = whole_scores(few, tmp_path / "whole")
    interrupt(directory, few, kill_at("samples", 1, 1), world=before)
    on_ranks(after, lambda rank: score_fully(directory, 2, few, "val", processes=rank))
    assert files_of(directory.scores) == wanted


def test_stage_1_goes_on_too(few: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trainer.scoring.predictor import AnchorPredictor

    one, other = (StageDirectory(tmp_path / name / "stage1") for name in ("one", "other"))
    for made in (one, other):
        make_checkpoint(made, few, stage=1)
    score_fully(one, 1, few, "val")
    honest, seen = AnchorPredictor.predict, []

    def mortal(self: AnchorPredictor, batch: Batch) -> Pairs:
        seen.append(int(batch.windows[0]))
        if len(seen) == 3:
            raise Killed
        return honest(self, batch)

    monkeypatch.setattr(AnchorPredictor, "predict", mortal)
    with pytest.raises(Killed):
        score_fully(other, 1, few, "val")
    score_fully(other, 1, few, "val")
    assert seen == [0, 1, 2, 2]
    assert files_of(other.scores) == files_of(one.scores)


@pytest.mark.parametrize("changed", ["samples", "seed", "scaling", "weights", "runs"])
def test_what_was_kept_under_other_conditions_is_not_used(
    few: Study,
    directory: StageDirectory,
    changed: str,
    tiny_shards: Path,
    debug_config: Path,
    done: list[tuple[str, int, int]],
) -> None:
    interrupt(directory, few, kill_at("samples", 1, 0))
    keys = {"samples": ["evaluate.samples=4"], "seed": ["seed=4"], "scaling": ["bold.standardise=run"]}.get(changed, [])
    if changed == "weights":
        found = checkpoint.load(checkpoint.folder_of(directory.checkpoints, 6))
        found.model["latent.residual_std"] += 1
        checkpoint.save(directory.checkpoints, 6, found)
    study = make_few(tiny_shards, debug_config, *keys)
    if changed == "runs":
        study.spans["val"][0] = replace(study.spans["val"][0], stop=40)
    done.clear()
    score_fully(directory, 2, study, "val")
    assert len(done) == 3 + 11
    assert not (directory.scores / FOLDER).exists()


def test_torn_and_doubled_files_are_judged_again(few: Study, directory: StageDirectory, tmp_path: Path) -> None:
    wanted = whole_scores(few, tmp_path / "whole")
    interrupt(directory, few, kill_at("samples", 2, 0))
    (folder,) = (directory.scores / FOLDER).iterdir()
    (sums,) = folder.glob("connectivity-*.npz")
    (folder / "connectivity-another.1.0.npz").write_bytes(sums.read_bytes())
    (folder / "run-00001.npz").write_bytes(b"PK torn")
    (folder / "judged-00000-001.npz").write_bytes((folder / "judged-00000-001.npz").read_bytes()[:100])
    score_fully(directory, 2, few, "val")
    assert files_of(directory.scores) == wanted


def test_two_who_score_the_same_do_not_count_anything_twice(
    few: Study, directory: StageDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = whole_scores(few, tmp_path / "whole")
    for run in (1, 2):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(judging.Judge, "take_kept", lambda _: {})  # both began before the other had judged anything
            interrupt(directory, few, kill_at("samples", run, 0))
    score_fully(directory, 2, few, "val")
    assert files_of(directory.scores) == wanted


def test_a_disk_that_is_full_costs_no_scores(
    few: Study, directory: StageDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    wanted = whole_scores(few, tmp_path / "whole")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(np, "savez", full)
    score_fully(directory, 2, few, "val")
    assert capsys.readouterr().err.count("warning: ") == 1
    assert files_of(directory.scores) == wanted


def test_a_plain_scoring_keeps_nothing(few: Study, directory: StageDirectory) -> None:
    from trainer.scoring.score import score_checkpoint

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        watch(patch, kill_at("scores", 2))
        score_checkpoint(directory, 2, 6, few, ["val"], ALONE, lambda _: None, full=False)
    assert not directory.scores.exists()
