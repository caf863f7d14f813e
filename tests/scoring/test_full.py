"""What a full scoring says beyond r: the parts that a set is made of, and how sure its r is."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.ranks import ThreadRank, on_ranks
from tests.scoring.conftest import make_study
from tests.scoring.test_score import ALONE, Lifted, Spoilt, Told, make_checkpoint
from trainer.data.study import Study
from trainer.run import checkpoint
from trainer.run.directory import StageDirectory
from trainer.scoring import full
from trainer.scoring.records import write_scores
from trainer.scoring.score import score_checkpoint
from trainer.scoring.sets import score_set

FEW = ("evaluate.bootstrap=20", "evaluate.samples=3")


@pytest.fixture
def few(tiny_shards: Path, debug_config: Path) -> Study:
    """Seven runs, and few resamplings and samples."""
    return make_study(tiny_shards, debug_config, *FEW)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def score_fully(directory: StageDirectory, stage: int, study: Study, *sets: str, processes: Any = ALONE) -> list[str]:
    said: list[str] = []
    score_checkpoint(directory, stage, 6, study, sets, processes, said.append, full=True)
    return said


def test_runs_films_and_seasons_have_an_r_of_their_own(study: Study) -> None:
    study.__dict__["scaling"] = Lifted()
    scores = score_set(Told(), study, "val", ALONE)
    samples = [study.manifest.samples[span.sample] for span in study.spans["val"]]
    keys = full.part_keys(scores, "mean", samples)
    alone = {}
    for i, sample in enumerate(samples):
        alone[sample.key] = scores.runs[i].pairs["mean"].compute().overall
    assert keys["per_run"] == pytest.approx(alone)
    assert len(set(keys["per_run"].values())) == 7
    films = ["season 1", "season 2", "season 3", "season 4", "season 5", "bourne", "wolf"]
    assert list(keys["per_film"]) == films
    as_one = full.part_keys(scores, "mean", [replace(sample, season=None, film="x") for sample in samples])
    assert as_one["per_film"] == {"x": pytest.approx(scores.correlations["mean"].overall)}
    by_series = full.part_keys(scores, "mean", [replace(sample, season=None, film=None) for sample in samples])
    assert list(by_series["per_film"]) == ["friends", "movie10"]


def test_a_run_that_is_not_predicted_in_numbers_is_null_among_the_others(study: Study) -> None:
    study.__dict__["scaling"] = Lifted()
    scores = score_set(Spoilt(float("nan")), study, "val", ALONE)
    samples = [study.manifest.samples[span.sample] for span in study.spans["val"]]
    found = full.part_keys(scores, "mean", samples)["per_run"]
    assert [r is None for r in found.values()] == [False, False, False, True, False, False, False]


def test_a_score_file_holds_its_intervals_and_the_resamplings_lie_beside_it(few: Study, tmp_path: Path) -> None:
    directory = StageDirectory(tmp_path / "stage1")
    make_checkpoint(directory, few, stage=1)
    said = score_fully(directory, 1, few, "val")
    score = json.loads((directory.scores / "step_00000006-val-mean.json").read_text())
    resampled = np.load(directory.scores / "step_00000006-val-mean-bootstrap.npy")
    assert resampled.shape == (20, 4)
    assert score["full"] is True
    assert score["ci_by"] == "blocks of 60 s"
    assert score["ci"] == pytest.approx(np.quantile(resampled.mean(axis=1), [0.025, 0.975]))
    assert score["ci_per_subject"]["3"] == pytest.approx(np.quantile(resampled[:, 2], [0.025, 0.975]))
    assert score["ci"][0] < score["pearson_r"] < score["ci"][1]
    assert any("95 % interval of r" in text for text in said)


def test_one_run_that_lacks_a_subject(few: Study, tmp_path: Path) -> None:
    directory = StageDirectory(tmp_path / "stage1")
    make_checkpoint(directory, few, stage=1)
    few.spans["val"] = [replace(few.spans["val"][2], subjects=(True, True, False, True))]
    score_fully(directory, 1, few, "val")
    score = json.loads((directory.scores / "step_00000006-val-mean.json").read_text())
    present = [few.manifest.subjects[s] for s in (0, 1, 3)]
    assert list(score["per_run"].values()) == [pytest.approx(score["pearson_r"])]
    assert list(score["per_subject"]) == list(score["ci_per_subject"]) == present
    resampled = np.load(directory.scores / "step_00000006-val-mean-bootstrap.npy")
    assert np.isnan(resampled).all(axis=0).tolist() == [False, False, True, False]
    assert score["ci"] == pytest.approx(np.quantile(resampled[:, [0, 1, 3]].mean(axis=1), [0.025, 0.975]))
    with np.load(directory.scores / "step_00000006-val-series.npz") as series:
        assert series["parcels"][2].tolist() == [-1, -1]
        assert np.isnan(series["bold"]).all(axis=(1, 2)).tolist() == [False, False, True, False]


def test_a_run_no_longer_than_a_block_has_no_interval(few: Study, tmp_path: Path) -> None:
    """Every resampling would be the run itself."""
    directory = StageDirectory(tmp_path / "stage1")
    make_checkpoint(directory, few, stage=1)
    few.spans["val"] = few.spans["val"][1:2]
    assert len(few.spans["val"][0]) == 40
    score_fully(directory, 1, few, "val")
    assert "ci" not in json.loads((directory.scores / "step_00000006-val-mean.json").read_text())
    assert not list(directory.scores.glob("*-bootstrap.npy"))


def test_no_resamplings_are_no_interval(tiny_shards: Path, debug_config: Path, tmp_path: Path) -> None:
    study = make_study(tiny_shards, debug_config, "evaluate.bootstrap=0", "evaluate.samples=0")
    directory = StageDirectory(tmp_path / "stage1")
    make_checkpoint(directory, study, stage=1)
    score_fully(directory, 1, study, "val")
    assert "ci" not in json.loads((directory.scores / "step_00000006-val-mean.json").read_text())


@pytest.mark.parametrize("stage", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_any_number_of_ranks_writes_the_same_bits(few: Study, tmp_path: Path, stage: int) -> None:
    few.spans["val"] = few.spans["val"][:3]
    alone = StageDirectory(tmp_path / "1" / f"stage{stage}")
    make_checkpoint(alone, few, stage=stage)
    score_fully(alone, stage, few, "val", "test")
    wanted = files_of(tmp_path / "1")
    for world in (2, 3):
        directory = StageDirectory(tmp_path / str(world) / f"stage{stage}")
        make_checkpoint(directory, few, stage=stage)

        def work(rank: ThreadRank, directory: StageDirectory = directory) -> list[str]:
            return score_fully(directory, stage, few, "val", "test", processes=rank)

        said = on_ranks(world, work)
        assert said[0]
        assert not any(said[1:])
        found = files_of(tmp_path / str(world))
        assert sorted(found) == sorted(wanted)
        assert [name for name in wanted if name.endswith((".json", ".npy")) and found[name] != wanted[name]] == []
        for name in (name for name in wanted if name.endswith(".npz")):
            with np.load(tmp_path / str(world) / name) as ours, np.load(tmp_path / "1" / name) as theirs:
                assert sorted(ours) == sorted(theirs)
                for key in ours:
                    np.testing.assert_array_equal(ours[key], theirs[key])


def test_training_and_worker_keep_what_the_other_has_written(few: Study, tmp_path: Path) -> None:
    directory = StageDirectory(tmp_path / "stage1")
    make_checkpoint(directory, few, stage=1)
    path = directory.scores / "step_00000006-val-mean.json"
    score_fully(directory, 1, few, "val")
    in_full = json.loads(path.read_text())

    scores = score_set(Told(), few, "val", ALONE)
    facts = {"stage": 1, "step": 6, "set": "val", "epoch": 2, "validation": True}
    write_scores(directory, scores, few.manifest.subjects, facts)
    another = json.loads(path.read_text())
    assert "full" not in another, "another r: another checkpoint of that step, of which the worker knows nothing"
    score_fully(directory, 1, few, "val")
    assert json.loads(path.read_text()) == {**in_full, "validation": True}
    assert checkpoint.best_step(directory.read_scores(), "val") == 6

    score_checkpoint(directory, 1, 6, few, ["val"], ALONE, lambda _: None, full=False)
    assert json.loads(path.read_text()) == {**in_full, "validation": True}

    path.write_text(json.dumps({**in_full, "pearson_r": None}))
    score_checkpoint(directory, 1, 6, few, ["val"], ALONE, lambda _: None, full=False)
    assert "full" not in json.loads(path.read_text())
    path.write_text("torn")
    score_checkpoint(directory, 1, 6, few, ["val"], ALONE, lambda _: None, full=False)
    assert json.loads(path.read_text())["pearson_r"] == in_full["pearson_r"]


def spoil(directory: StageDirectory) -> None:
    """The checkpoint's anchor says what is not a number, of one parcel."""
    folder = directory.anchor if directory.path.name == "stage2" else directory.checkpoints / "step_00000006"
    found = checkpoint.load(folder, weights_only=True)
    biases = [name for name, value in found.model.items() if name.endswith("bias") and value.shape == (20,)]
    for name in biases:
        found.model[name][7] = float("nan")
    assert biases
    again = directory.path / "spoilt"
    facts = {key: found.meta[key] for key in ("shapes", "steps_per_epoch")}
    checkpoint.save(again, 6, checkpoint.Checkpoint(found.model, {}, facts))
    shutil.rmtree(folder)
    shutil.move(checkpoint.folder_of(again, 6), folder)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("stage", [1, 2])
def test_predictions_that_are_no_numbers_are_reported_in_every_file(few: Study, tmp_path: Path, stage: int) -> None:
    few.spans["val"] = few.spans["val"][:2]
    directory = StageDirectory(tmp_path / f"stage{stage}")
    make_checkpoint(directory, few, stage=stage)
    spoil(directory)
    said = score_fully(directory, stage, few, "val", "test")
    assert any("not a number" in text for text in said)
    for name in ("val", "test"):
        score = json.loads((directory.scores / f"step_00000006-{name}-mean.json").read_text())
        assert score["pearson_r"] is None
        assert set(score["per_run"].values()) == {None}
        assert score["rsa"] == {"all": None}
        assert "ci" not in score
        assert np.isnan(np.load(directory.scores / f"step_00000006-{name}-mean.npy")[:, 7]).all()
        with np.load(directory.scores / f"step_00000006-{name}-series.npz") as series:
            assert (series["parcels"] >= (0 if stage == 1 else -1)).all()
            assert not (series["parcels"] == 7).any()
    assert json.loads((directory.scores / "step_00000006-test-mean.json").read_text())["r_over_ceiling"] is None
    if stage == 2:
        record = json.loads((directory.scores / "step_00000006-val-distribution.json").read_text())
        assert record["flow"]["crps"] is None
        assert record["independent"]["crps"] is None
