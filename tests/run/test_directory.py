"""A run directory says who started, how far it is, and is not taken from another run."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from trainer.errors import InputError
from trainer.run import directory
from trainer.run.directory import RunDirectory, StageDirectory, write_json


@contextlib.contextmanager
def running_elsewhere(stage: StageDirectory) -> Iterator[None]:
    """Make the stage's newest start one of another host, whose counter advances."""
    owner = {"host": "node7", "pid": 12, "machine": "another", "born": 1}
    write_json(stage.path / "starts" / "2.json", owner)
    beat = {**owner, "step": 7, "total": 20, "title": "Stage 1", "start": 2}
    write_json(stage.path / "heartbeat.json", {**beat, "count": 0})
    stop = threading.Event()

    def beat_on() -> None:
        count = 0
        while not stop.wait(0.05):
            write_json(stage.path / "heartbeat.json", {**beat, "count": (count := count + 1)})

    thread = threading.Thread(target=beat_on)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def test_json_appears_whole_and_refuses_nan(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="nan"):
        write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in path.parent.iterdir()] == ["x.json"]


def test_each_start_is_recorded_with_versions_and_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = StageDirectory(tmp_path)
    assert not stage.has_started()
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    assert stage.begin("seed: 1\n", world=2, launcher="srun") == 1
    assert stage.begin("seed: 1\n", world=4) == 2
    first, second = (json.loads((tmp_path / "starts" / f"{n}.json").read_text()) for n in (1, 2))
    assert (first["world"], second["world"]) == (2, 4)
    assert first["versions"]["torch"]
    assert (first["launcher"], first["slurm"]["SLURM_JOB_ID"]) == ("srun", "4711")
    assert {"host", "pid", "command", "git_commit", "git_diff"} <= set(first)
    assert stage.has_started()


def test_a_refused_start_leaves_the_configuration_alone(tmp_path: Path) -> None:
    stage = StageDirectory(tmp_path)
    stage.begin("seed: 1\n")
    with running_elsewhere(stage), pytest.raises(InputError, match="process 12 on node7"):
        stage.begin("seed: 2\n")
    assert stage.config.read_text() == "seed: 1\n"


def test_of_lines_that_a_resume_repeats_the_later_counts(tmp_path: Path) -> None:
    stage = StageDirectory(tmp_path)
    for step, loss in ((1, 9.0), (2, 8.0), (2, 7.0)):
        stage.append_metrics(kind="train", step=step, loss=loss)
    with stage.metrics.open("a") as file:
        file.write('{"kind": "tr')  # a crash in the middle of a line
    stage.append_metrics(kind="train", step=3, loss=6.0)
    assert [line["loss"] for line in stage.read_metrics()] == [9.0, 7.0, 6.0]


def test_lines_of_the_log_that_are_none_are_left_out(tmp_path: Path) -> None:
    stage = StageDirectory(tmp_path)
    stage.append_metrics(kind="train", step=1, loss=9.0)
    with stage.metrics.open("ab") as file:
        file.write(b'null\n[1]\n5\n"x"\n{}\n\xff\xfe\n')  # a block of a file that was copied half-way
    stage.append_metrics(kind="train", step=2, loss=8.0)
    assert [line["loss"] for line in stage.read_metrics()] == [9.0, 8.0]


def test_the_readme_and_the_docstring_list_what_a_run_holds() -> None:
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text()
    listing = readme.partition("\nA run directory")[2].partition("```\n")[2].partition("```")[0]
    for name in (*directory._OURS, "refit", "checkpoints", "logs", "scores", "claims", "anchor"):
        assert f"{name}/" in listing, name
        assert f"{name}/" in (directory.__doc__ or ""), name


def test_what_scoring_leaves_beside_deleted_stages_is_no_stranger(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    for name in ("ceilings/val.json", "ensemble/test.json", "figures/loss.pdf", "report.html"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    run.claim([1], resume=False, overwrite=False)


NO_OBJECT = [b"", b"{", b"null", b"[1]", b"5", b'"x"', b"\xff"]


@pytest.mark.parametrize("content", [*NO_OBJECT, b"{}"])
def test_an_end_that_cannot_be_read_is_named_and_not_taken_for_none(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "finished.json").write_bytes(content)
    with pytest.raises(InputError, match=r"finished\.json: cannot be read: found "):
        StageDirectory(tmp_path).finished()


@pytest.mark.parametrize("content", NO_OBJECT)
def test_a_score_file_that_cannot_be_read_is_named(content: bytes, tmp_path: Path) -> None:
    stage = StageDirectory(tmp_path)
    write_json(stage.scores / "step_00000001-val-distribution.json", {"of": "another kind"})
    path = stage.scores / "step_00000001-val-mean.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"{path.name}: cannot be read: found "):
        list(stage.read_scores())


def test_a_run_is_not_overwritten_unasked(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.claim([1, 2], resume=False, overwrite=False)
    run.stage(1).begin("seed: 1\n")
    with pytest.raises(InputError, match=r"training\. Give --resume to continue it, --overwrite to start anew"):
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
        run.stage(number).begin("seed: 1\n")
    with pytest.raises(InputError, match="stands around the stage 1"):
        run.claim([1], resume=False, overwrite=True)
    assert run.stage(1).has_started()
    run.claim([1, 2], resume=False, overwrite=True)
    assert not run.stage(2).has_started()


def test_a_training_that_runs_is_named_and_not_deleted(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    for number in (1, 2):
        run.stage(number).begin("seed: 1\n")
    known = r"stage2: holds another training: found process 12 on node7 \(Stage 1, step 7 of 20\), which has not ended"
    with running_elsewhere(run.stage(2)):
        with pytest.raises(InputError, match=known):
            run.claim([1, 2], resume=False, overwrite=False)
        with pytest.raises(InputError, match="stage2: another training runs there: found process 12 on node7"):
            run.claim([1, 2], resume=False, overwrite=True)
    assert run.stage(1).has_started()


def test_a_start_that_was_killed_at_once_and_a_deletion_that_was_cut_short_are_no_strangers(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.stage(1).begin("seed: 1\n")
    run.stage(1).config.unlink()  # killed before it was written
    with pytest.raises(InputError, match="holds another training"):
        run.claim([1], resume=False, overwrite=False)
    run.stage(1).path.rename(tmp_path / ".stage1.deleted.99")
    (tmp_path / ".probe.99").touch()
    run.claim([1], resume=False, overwrite=False)
    run.claim([1], resume=False, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == [".probe.99"]


def test_a_log_that_the_disk_does_not_take_is_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "logs").write_text("no folder")
    StageDirectory(tmp_path).append_metrics(kind="train", step=1)
    assert "warning: " in capsys.readouterr().err


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
