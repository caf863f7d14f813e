"""--wait: what the states of the jobs mean, whose lines are shown, and that the waiting ends."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import pytest

from trainer.cluster import waiting
from trainer.cluster.chain import Run, pipeline
from trainer.cluster.records import Record
from trainer.cluster.waiting import Part, guilty_task, parts_of, wait
from trainer.run.files import write_json
from trainer.run.jobs import JobState

DONE, FAILED, GONE = JobState("COMPLETED"), JobState("FAILED", exit_code="1:0"), JobState()
CANCELLED, RUNNING = JobState("CANCELLED"), JobState("RUNNING", nodes="n[1-2]")


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "POLL_EVERY_S", 0.01)
    monkeypatch.setattr(waiting, "FORGOTTEN_AFTER_S", 0.05)


def chain(run: Path, links: int = 1) -> list[Part]:
    jobs = pipeline(run, [Run(run, run / "c.yaml")], links=links)
    return parts_of(jobs, {job.key: str(number) for number, job in enumerate(jobs, 11)}, run / "slurm")


def waited(parts: Sequence[Part], *polls: Mapping[str, JobState]) -> tuple[int, list[str]]:
    """The exit status and what is said, where SLURM answers one poll after the other; of others it says `COMPLETED`."""
    answers, lines = list(polls), list[str]()

    def ask(ids: Sequence[str]) -> dict[str, JobState]:
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        keys = {part.id: part.key for part in parts}
        return {job_id: answer.get(keys[job_id], DONE) for job_id in ids}

    return wait(parts, ask=ask, say=lines.append), lines


def leave(run: Path, job_id: str, statuses: Sequence[int | None], text: str = "") -> None:
    """What the tasks of a job leave behind: records, and a log of the first that failed."""
    for rank, status in enumerate(statuses):
        record = Record(rank, len(statuses), "n1", 1, 0.0, None if status is None else 10.0 - rank, status)
        write_json(run / "slurm" / job_id / "tasks" / f"0.{rank}.json", asdict(record))
    if text:
        guilty = next(rank for rank, status in enumerate(statuses) if status == 1)
        (run / "slurm" / f"{job_id}_{guilty}_log.err").write_text(text)


def test_each_change_is_said_once(tmp_path: Path) -> None:
    status, lines = waited(chain(tmp_path), {"stage1": RUNNING}, {"stage1": RUNNING}, {})
    assert status == 0
    assert sum("running on n[1-2]" in line for line in lines) == 1
    assert lines[-1] == "All jobs have ended well."


def test_a_failed_job_is_shown_with_the_lines_of_the_task_that_is_the_cause(tmp_path: Path) -> None:
    leave(tmp_path, "11", [75, 1, None], "Traceback\n" * 30 + "RuntimeError: made to raise\n")
    status, lines = waited(chain(tmp_path), {"stage1": FAILED, "stage2": CANCELLED, "evaluate2": CANCELLED})
    text = "\n".join(lines)
    assert status == 1
    assert "stage1 (job 11) has failed: FAILED, exit status 1:0" in text
    assert "task 1 of 3 on n1" in text and "11_1_log.err" in text
    assert "    RuntimeError: made to raise" in lines
    assert lines[-1] == "cancelled, as it cannot begin without that: stage2 (job 13), evaluate2 (job 14)"
    assert text.count("Traceback") < 30


def test_a_link_that_was_followed_by_a_good_one_is_no_failure(tmp_path: Path) -> None:
    assert waited(chain(tmp_path, links=2), {"stage1": FAILED, "stage2": JobState("TIMEOUT")})[0] == 0


def test_links_that_fail_show_the_first_cause(tmp_path: Path) -> None:
    leave(tmp_path, "11", [1], "ValueError: of the first link\n")
    status, lines = waited(chain(tmp_path, links=2), {"stage1": FAILED, "stage1.2": FAILED})
    assert status == 1
    assert "    ValueError: of the first link" in lines


def test_of_a_report_that_had_nothing_to_show_no_lines_are_shown(tmp_path: Path) -> None:
    leave(tmp_path, "11", [1], "ValueError\n")
    leave(tmp_path, "15", [1], "error: holds no training\n")
    _, lines = waited(chain(tmp_path), {"stage1": FAILED, "report": FAILED})
    assert not any("holds no training" in line for line in lines)


def test_a_forgotten_job_is_judged_by_what_it_left(tmp_path: Path) -> None:
    leave(tmp_path, "12", [0])
    (tmp_path / "stage1").mkdir()
    (tmp_path / "stage1" / "finished.json").touch()
    assert waited(chain(tmp_path), {"stage1": GONE, "evaluate1": GONE})[0] == 0
    status, lines = waited(chain(tmp_path), {"stage2": GONE})
    assert status == 1 and any("stage2 (job 13) has failed: SLURM has forgotten it" in line for line in lines)


def test_who_waits_for_what_cannot_come_is_cancelled(tmp_path: Path) -> None:
    never = JobState("PENDING", "DependencyNeverSatisfied")
    assert waited(chain(tmp_path), {"stage1": FAILED, "stage2": never})[0] == 1


def test_a_signal_ends_the_waiting_and_leaves_the_jobs_alone(tmp_path: Path) -> None:
    lines: list[str] = []

    def ask(ids: Sequence[str]) -> dict[str, JobState]:
        os.kill(os.getpid(), signal.SIGINT)
        return dict.fromkeys(ids, RUNNING)

    assert wait(chain(tmp_path), ask=ask, say=lines.append) == 128 + signal.SIGINT
    assert lines[-1] == "The jobs go on without this command."


def test_the_cause_is_the_first_error_of_a_tasks_own() -> None:
    def record(rank: int, status: int | None, ended: float = 1.0) -> Record:
        return Record(rank, 4, "n1", 1, 0.0, ended, status)

    assert guilty_task([record(0, 75), record(1, 1, 5.0), record(2, 2, 4.0)]) == record(2, 2, 4.0)
    assert guilty_task([record(0, 75), record(1, None)]) == record(1, None)
    assert guilty_task([record(0, 0), record(1, 138)]) is None
