"""What a run holds is read as far as it is there; what is torn is said, and never an end."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.evaluation.conftest import copy_run
from trainer.evaluation.results import read_results
from trainer.run.directory import RunDirectory


@pytest.fixture
def copy(full_run: Path, tmp_path: Path) -> Path:
    return copy_run(full_run, tmp_path / "run")


def test_a_run_that_was_scored_in_full_is_there_in_full(full_run: Path) -> None:
    results = read_results(full_run)
    assert results.notes == []
    assert results.sets == ["test", "val"], "what nothing was chosen by comes first"
    assert results.final is results.stages[2]
    for stage in results.stages.values():
        assert {"test", "val"} == set(stage.series)
        assert [part.state for part in stage.status] == ["finished"]
        assert stage.curves.loss and stage.curves.r["val"] and stage.curves.chosen == stage.step
        for scored in stage.scored:
            assert scored.r is not None and scored.r.shape == (4, 20)
            assert scored.bootstrap is not None and scored.bootstrap.shape == (50, 4)
    assert set(results.stages[2].distributions["test"].arrays) >= {"fc_bold", "fc_flow", "frequency_hz"}
    assert results.ceilings["test"].shape == (4, 20)
    assert results.manifest is not None and results.config is not None


def test_torn_files_are_named_and_the_rest_is_read(copy: Path) -> None:
    scores = sorted((copy / "stage2" / "scores").glob("*-test-*"))
    torn = {path.suffix: path for path in scores if path.name.endswith(("-mean.npy", "series.npz", "sample.json"))}
    for path in torn.values():
        path.write_bytes(path.read_bytes()[:40])
    (copy / "ceilings" / "test.npy").write_bytes(b"")
    results = read_results(copy)
    assert all(any(str(path) in note for note in results.notes) for path in torn.values())
    assert len(results.notes) == 4
    assert "test" not in results.stages[2].series and "val" in results.stages[2].series
    mean = results.stages[2].find("test")
    assert mean is not None and mean.r is None and mean.bootstrap is not None
    assert results.stages[2].find("test", "sample") is None


def test_files_that_hold_something_else_are_named_and_the_rest_is_read(copy: Path) -> None:
    stage = RunDirectory(copy).stage(1)
    others = [
        stage.path / "finished.json",
        stage.path / "starts" / "1.json",
        next(stage.scores.glob("*-test-mean.json")),
    ]
    for path, content in zip(others, ("[1]", "5", "null"), strict=True):
        path.write_text(content)
    with stage.metrics.open("ab") as file:
        file.write(b"null\n[1]\n\xff\n")
    results = read_results(copy)
    for path in others[::2]:
        assert any(note.startswith(f"{path}: cannot be read: found ") for note in results.notes)
    assert results.stages[1].curves.loss and results.stages[1].find("val") and not results.stages[1].find("test")
    assert results.stages[2].find("test")


def test_an_array_of_other_subjects_is_not_taken_for_these(copy: Path) -> None:
    path = next((copy / "stage1" / "scores").glob("*-test-mean.npy"))
    np.save(path, np.zeros((3, 20)))
    results = read_results(copy)
    assert results.notes == [f"{path}: found 3 subjects, expected 4"]
    assert (found := results.stages[1].find("test")) is not None and found.r is None


def test_a_stage_that_never_finished_shows_its_best_checkpoint(copy: Path) -> None:
    (copy / "stage1" / "finished.json").unlink()
    stage = RunDirectory(copy).stage(1)
    curve = {score["step"]: score["pearson_r"] for score in stage.read_scores() if score["set"] == "val"}
    assert read_results(copy).stages[1].step == max(curve, key=lambda step: curve[step])


def test_scores_of_a_refit_stand_in_for_those_of_the_stage(copy: Path) -> None:
    source = next((copy / "stage1" / "scores").glob("*-test-mean.json"))
    target = copy / "stage1" / "refit" / "scores" / source.name
    target.parent.mkdir(parents=True)
    target.write_text(json.dumps(json.loads(source.read_text()) | {"pearson_r": 0.75}))
    found = read_results(copy).stages[1]
    assert [(s.set_name, s.refitted) for s in found.scored] == [("test", True), ("val", False)]
    assert (test := found.find("test")) is not None and test.score["pearson_r"] == 0.75


def test_shards_that_are_gone_and_a_configuration_of_another_version_are_no_end(copy: Path) -> None:
    config = copy / "stage2" / "config.yaml"
    config.write_text(config.read_text().replace("shards: ", "shards: /nowhere"))
    assert read_results(copy).manifest is None
    config.write_text("strange: 1\n")
    results = read_results(copy)
    assert results.config is None and results.sets == ["test", "val"]
    assert any("strange" in note for note in results.notes)


def test_nothing_has_begun_in_an_empty_folder(tmp_path: Path) -> None:
    results = read_results(tmp_path)
    assert (results.stages, results.final, results.sets, results.validation) == ({}, None, [], None)
