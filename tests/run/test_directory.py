"""A run directory says who started, how far it is, and is not taken from another run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trainer.errors import InputError
from trainer.run.directory import RunDirectory, StageDirectory, write_json


def test_json_appears_whole_and_refuses_nan(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="nan"):
        write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in path.parent.iterdir()] == ["x.json"]


def test_each_start_is_recorded_with_versions_and_command(tmp_path: Path) -> None:
    stage = StageDirectory(tmp_path)
    assert not stage.has_started()
    stage.record_start("seed: 1\n", world=2)
    stage.record_start("seed: 1\n", world=4)
    first, second = (json.loads((tmp_path / "starts" / f"{n}.json").read_text()) for n in (1, 2))
    assert (first["world"], second["world"]) == (2, 4)
    assert first["versions"]["torch"]
    assert {"host", "pid", "command", "git_commit", "git_diff"} <= set(first)
    assert stage.has_started()


def test_beats_come_at_most_every_few_seconds(tmp_path: Path) -> None:
    stage = StageDirectory(tmp_path)
    stage.beat(1)
    stage.beat(2)
    assert json.loads((tmp_path / "heartbeat.json").read_text())["step"] == 1


def test_of_lines_that_a_resume_repeats_the_later_counts(tmp_path: Path) -> None:
    stage = StageDirectory(tmp_path)
    for step, loss in ((1, 9.0), (2, 8.0), (2, 7.0)):
        stage.append_metrics(kind="train", step=step, loss=loss)
    with stage.metrics.open("a") as file:
        file.write('{"kind": "tr')  # a crash in the middle of a line
    assert [line["loss"] for line in stage.read_metrics()] == [9.0, 7.0]


def test_a_run_is_not_overwritten_unasked(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.claim([1, 2], resume=False, overwrite=False)
    run.stage(1).record_start("seed: 1\n")
    with pytest.raises(InputError, match="--resume to continue it, --overwrite to start anew"):
        run.claim([1, 2], resume=False, overwrite=False)
    run.claim([2], resume=False, overwrite=False)
    run.claim([1], resume=True, overwrite=False)
    run.claim([1], resume=False, overwrite=True)
    assert not run.stage(1).has_started()
    with pytest.raises(InputError, match="together"):
        run.claim([1], resume=True, overwrite=True)


def test_stage_1_is_not_deleted_under_a_stage_2_that_stands_on_it(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    for number in (1, 2):
        run.stage(number).record_start("seed: 1\n")
    with pytest.raises(InputError, match="stands around the stage 1"):
        run.claim([1], resume=False, overwrite=True)
    assert run.stage(1).has_started()
    run.claim([1, 2], resume=False, overwrite=True)
    assert not run.stage(2).has_started()


def test_a_folder_that_only_has_a_stages_name_is_kept(tmp_path: Path) -> None:
    (tmp_path / "stage1").mkdir()
    (tmp_path / "stage1" / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="stage1: is no stage of a run"):
        RunDirectory(tmp_path).claim([1, 2], resume=False, overwrite=True)
    assert (tmp_path / "stage1" / "thesis.tex").exists()


def test_a_folder_with_something_else_is_refused_even_with_overwrite(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match=r"is no run directory: found thesis\.tex"):
        RunDirectory(tmp_path).claim([1], resume=False, overwrite=True)
    assert (tmp_path / "thesis.tex").exists()


def test_an_unwritable_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file/run: cannot be written"):
        RunDirectory(tmp_path / "file" / "run").claim([1], resume=False, overwrite=False)
