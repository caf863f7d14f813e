"""What a submission has written is deleted when SLURM refuses it, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from trainer.cluster import traces
from trainer.cluster.traces import Traces, main
from trainer.errors import InputError
from trainer.run import jobs as queue


def gone(ids: Sequence[str]) -> tuple[tuple[str, ...], str]:
    return (), ""


def tree(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def job(job_id: str) -> queue.Job:
    return queue.Job("stage1", job_id, "train", 1, 0.0)


def test_a_new_run_is_gone_with_its_folder_and_what_its_jobs_wrote(tmp_path: Path) -> None:
    run = tmp_path / "output" / "run"
    made = Traces([run])
    made.make(run / "slurm")
    (run / "stage1").mkdir()
    queue.record(run, [job("12")])
    assert made.undo(ask=gone) == ""
    assert tree(tmp_path) == []


def test_a_run_of_others_in_the_folder_of_runs_stays(tmp_path: Path) -> None:
    made = Traces([tmp_path / "output" / "run"])
    made.make(tmp_path / "output" / "run" / "slurm")
    (tmp_path / "output" / "other").mkdir()
    made.undo(ask=gone)
    assert tree(tmp_path) == ["output", "output/other"]


def test_of_a_run_that_was_there_only_the_files_of_the_new_jobs_go(pretended: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    earlier = ["1_submission.sh", "12_0_log.out", "config_1.yaml", "120/tasks"]
    ours = ["13_submission.sh", "14_0_submitted.pkl", "14_0_0_log.err", "13/tasks", "14_1/ends"]
    for name in [*earlier, *ours, "config_2.yaml"]:
        path = run / "slurm" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir() if "/" in name else path.touch()
    queue.record(run, [job("12")])
    before = queue.read(run)
    queue.record(run, [job("13"), job("14_0"), job("14_1")])
    made = Traces([run], files=[run / "slurm" / "config_2.yaml"], ids=["13", "14_0", "14_1"])
    made.make(run / "slurm")
    assert made.undo(ask=gone) == ""
    assert queue.read(run) == before
    assert tree(run) == ["slurm", *sorted(f"slurm/{name}" for name in [*earlier, "120", "jobs.json"])]
    assert (pretended / "cancelled").read_text().split() == ["13", "14"]


def test_jobs_that_had_begun_have_ended_before_their_files_are_deleted(
    pretended: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(traces, "LOOK_EVERY_S", 0.0)
    run = tmp_path / "run"
    made = Traces([run], ids=["12"])
    made.make(run / "slurm")
    answers = iter([(("12",), ""), (("12",), ""), ((), "")])

    def ask(ids: Sequence[str]) -> tuple[tuple[str, ...], str]:
        assert run.exists()
        (run / "slurm" / "12_0_log.out").write_text("saves")
        return next(answers)

    assert made.undo(ask=ask) == ""
    assert not run.exists() and next(answers, None) is None


def test_jobs_that_do_not_end_keep_their_files_and_are_named(
    pretended: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(traces, "END_WITHIN_S", 0.0)
    made = Traces([tmp_path / "run"], ids=["12_0", "12_1", "13"])
    made.make(tmp_path / "run" / "slurm")
    said = made.undo(ask=lambda ids: (("12_1",), ""))
    assert said.endswith("`scancel 12 13`.") and (tmp_path / "run" / "slurm").exists()
    (pretended / "scancel").write_text("#!/bin/sh\nexit 1\n")
    assert "may still be in the queue" in made.undo(ask=lambda ids: ((), "squeue does not answer"))
    assert made.undo(ask=gone) == "" and not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file/run: cannot be made: Not a directory\. Choose another --run"):
        Traces([]).make(tmp_path / "file" / "run")


def test_a_shell_makes_and_undoes_the_same(pretended: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "output" / "run"
    assert main(["make", str(run)]) == 0
    made = capsys.readouterr().out.split()
    assert made == [str(run.parent), str(run), str(run / "slurm")]
    assert main(["undo", str(run), "--made", *made, "--jobs", "12", "13"]) == 0
    assert capsys.readouterr().out == "\n"
    assert not run.parent.exists() and (pretended / "cancelled").read_text() == "12 13\n"
    assert main(["undo", str(run), "--made", "--jobs"]) == 0
