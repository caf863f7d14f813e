"""How a start of a job ended follows from the records of its tasks, and what follows from that: no cluster needed."""

from __future__ import annotations

import os
import shlex
import signal
import stat
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given

from trainer.cluster.ending import (
    EX_LOST,
    IDLE_STARTS,
    WISHES,
    Rules,
    Start,
    main,
    step_after,
    verdict,
    why_not_to_begin,
)
from trainer.cluster.records import Record, folder_of, read_end, write_end
from trainer.run.files import write_json

ROOT = Path(__file__).resolve().parents[2]
USR2, KILL = 128 + signal.SIGUSR2, 128 + signal.SIGKILL
OWN = st.integers(1, 127).filter(lambda status: status != EX_LOST)
ANY = st.one_of(st.none(), st.just(0), st.just(EX_LOST), st.sampled_from(WISHES), st.just(KILL), OWN)


def ended(*statuses: int | None, tasks: int | None = None) -> list[Record]:
    """Records of tasks that ended so."""
    return [Record(rank, tasks or len(statuses), status=status) for rank, status in enumerate(statuses)]


@given(st.lists(ANY, min_size=1, max_size=6), OWN, st.data())
def test_an_error_of_ones_own_wins_over_whatever_became_of_the_others(
    others: list[int | None], own: int, data: st.DataObject
) -> None:
    others.insert(data.draw(st.integers(0, len(others))), own)
    assert verdict(ended(*others)) == "failed"


@given(st.lists(st.sampled_from([0, EX_LOST, *WISHES]), max_size=6), st.sampled_from(WISHES))
def test_interrupted_are_those_that_a_signal_asked_to_end_and_those_that_lost_them(
    others: list[int], wish: int
) -> None:
    assert verdict(ended(*others, wish)) == "interrupted"


@given(st.lists(st.sampled_from([None, 0, EX_LOST, KILL, *WISHES]), max_size=6), st.sampled_from([None, KILL]))
def test_a_task_without_an_end_was_killed_and_nobody_is_blamed_for_it(
    others: list[int | None], last: int | None
) -> None:
    assert verdict(ended(*others, last)) == "killed"


@given(st.lists(ANY, min_size=1, max_size=6), st.integers(1, 3), st.one_of(st.none(), st.integers(0, 255)))
def test_a_task_that_never_wrote_counts_as_one_without_an_end(
    statuses: list[int | None], missing: int, of_srun: int | None
) -> None:
    some = ended(*statuses, tasks=len(statuses) + missing)
    assert verdict(some, of_srun) == verdict(ended(*statuses, *[None] * missing))


@given(st.permutations([0, USR2, None, EX_LOST]), st.integers(0, 4))
def test_the_order_of_tasks_tells_nothing(order: list[int | None], count: int) -> None:
    assert verdict(ended(*order[:count])) == verdict(ended(*reversed(order[:count])))


@pytest.mark.parametrize(
    ("statuses", "said"), [((0, 0), "done"), ((EX_LOST, EX_LOST), "killed"), ((0, EX_LOST), "killed")]
)
def test_tasks_that_all_end_alike(statuses: tuple[int, ...], said: str) -> None:
    assert verdict(ended(*statuses)) == said


@pytest.mark.parametrize(
    ("status", "said"), [(0, "done"), (1, "failed"), (127, "failed"), (137, "killed"), (None, "killed")]
)
def test_without_records_the_status_of_srun_is_all_there_is(status: int | None, said: str) -> None:
    assert verdict([], status) == said


@given(st.integers(0, 5), st.integers(1, 9))
def test_a_job_is_requeued_as_often_as_it_is_interrupted_and_no_more_than_max_requeues_when_it_is_killed(
    limit: int, killed: int
) -> None:
    rules = Rules("stage1", limit)
    assert step_after(rules, "interrupted", 0, killed).requeue
    step = step_after(rules, "killed", 137, killed)
    assert step.requeue == (killed <= limit)
    assert step.requeue or (step.status == 1 and f"max_requeues={limit}" in step.says)
    assert not step_after(rules, "failed", 3, killed).requeue
    assert step_after(rules, "failed", 3, killed).status == 3
    assert step_after(rules, "done", 0, killed) == step_after(rules, "done", 137, killed)


@given(st.lists(st.sampled_from(["interrupted", "killed", "done"]), max_size=8), st.integers(0, 5))
def test_a_job_begins_unless_it_failed_or_was_killed_too_often(verdicts: list[str], limit: int) -> None:
    starts = [Start("12", number, verdict) for number, verdict in enumerate(verdicts)]  # type: ignore[arg-type]
    why = why_not_to_begin(Rules("stage1", limit), starts)
    assert (why is None) == (verdicts.count("killed") <= limit)
    failed = [*starts, Start("13", 0, "failed", 2)]
    assert "job 13 ended by an error of its own (status 2)" in str(why_not_to_begin(Rules("stage1", limit), failed))


# The thin shell around it, with a scontrol that writes down what it is asked.

SCONTROL = """#!/bin/sh
echo "$@" >> {asked}
case $1 in
    show) echo "JobId=12 JobState={state} Dependency=(null)" ;;
    requeue) {requeue} ;;
esac
"""


class Job:
    """A job 12 in a run directory, as its batch script sees it."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.run, self.asked, self._bin = folder / "run", folder / "asked", folder / "bin"
        self._bin.mkdir()
        self._monkeypatch = monkeypatch
        for name in [name for name in os.environ if name.startswith(("SLURM_", "MASTER_"))]:
            monkeypatch.delenv(name)
        monkeypatch.setenv("SLURM_JOB_ID", "12")
        monkeypatch.setenv("PATH", str(self._bin))

    def restarted(self, times: int) -> None:
        self._monkeypatch.setenv("SLURM_RESTART_COUNT", str(times))

    def scontrol(self, *, state: str = "RUNNING", requeue: str = "true") -> None:
        """Put it in its place: it says a state, with a reason where there is one, and answers requests."""
        path = self._bin / "scontrol"
        path.write_text(SCONTROL.format(asked=shlex.quote(str(self.asked)), state=state, requeue=requeue))
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def tasks(self, *statuses: int | None, restart: int = 0, job: str = "12", idle: bool = False) -> None:
        for record in ended(*statuses):
            record = replace(record, idle=idle)
            write_json(folder_of(self.run, job) / "tasks" / f"{restart}.{record.rank}.json", asdict(record))

    def begin(self, *rules: str) -> int:
        return main(["begin", "--run", str(self.run), "--name", "stage1", *rules])

    def end(self, status: int, *rules: str) -> int:
        return main(["end", "--status", str(status), "--run", str(self.run), "--name", "stage1", *rules])

    def was_asked(self) -> Sequence[str]:
        return self.asked.read_text().splitlines() if self.asked.exists() else []


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    """Job 12, without scontrol."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # main is deaf to them for the rest of its life
    return Job(tmp_path, monkeypatch)


def test_an_interrupted_job_is_requeued_once(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    job.scontrol()
    job.tasks(USR2, USR2)
    assert job.end(0) == EX_LOST
    assert job.was_asked() == ["show job -o 12", "requeue 12"]
    assert capsys.readouterr().err == "stage1 (job 12, start 0): interrupted; requeued.\n"
    assert read_end(job.run, "12", 0)["verdict"] == "interrupted"


def test_a_job_that_ran_into_its_time_limit_is_requeued(job: Job) -> None:
    job.scontrol(state="COMPLETING Reason=TimeLimit")
    job.tasks(143)
    job.end(143)
    assert job.was_asked() == ["show job -o 12", "requeue 12"]


@pytest.mark.parametrize("state", ["CANCELLED Reason=None", "COMPLETING Reason=None"])
def test_a_cancelled_job_is_not_requeued(job: Job, capsys: pytest.CaptureFixture[str], state: str) -> None:
    job.scontrol(state=state)
    job.tasks(143)
    assert job.end(0) == EX_LOST
    assert job.was_asked() == ["show job -o 12"]
    assert "interrupted; SLURM is ending it (cancelled?), so it is not requeued." in capsys.readouterr().err


def test_a_failed_job_says_which_task_and_keeps_its_status(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    job.scontrol()
    job.tasks(EX_LOST, 2, None)
    assert job.end(143) == 2
    assert job.was_asked() == []
    said = capsys.readouterr().err
    assert "task 1 of 3 on  ended with status 2" in said and "task 2 of 3 on  came to no end of its own" in said
    assert said.endswith("error: failed, and is not tried again. Mend it and submit again: it continues.\n")


def test_kills_of_all_starts_count(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    job.scontrol()
    job.restarted(2)
    job.tasks(None, restart=0)
    job.tasks(USR2, restart=1)
    job.tasks(None, restart=2)
    assert job.end(137, "--max-requeues", "2") == EX_LOST
    assert job.was_asked()[-1] == "requeue 12"
    assert job.end(137, "--max-requeues", "1") == 1
    assert "error: killed 2 times, which is more often than max_requeues=1 allows" in capsys.readouterr().err


def test_a_job_that_is_always_asked_to_end_before_it_trains_is_not_requeued_for_ever(
    job: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    job.scontrol()
    for restart, idle in enumerate([True, True, False, *[True] * IDLE_STARTS]):
        job.restarted(restart)
        job.tasks(USR2, restart=restart, idle=idle)
        last = job.end(0)
        assert last == (1 if restart == IDLE_STARTS + 2 else EX_LOST)
    assert len([asked for asked in job.was_asked() if asked == "requeue 12"]) == IDLE_STARTS + 2
    assert "error: asked to end 5 times in a row before anything was trained" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("requeue", "why"),
    [
        (None, "scontrol is missing on this node"),
        ("echo 'Requested operation is presently disabled' >&2; exit 1", "(Requested operation is presently disabled)"),
    ],
)
def test_where_slurm_does_not_requeue_the_next_link_goes_on_or_a_person(
    job: Job, capsys: pytest.CaptureFixture[str], requeue: str | None, why: str
) -> None:
    if requeue is not None:
        job.scontrol(requeue=requeue)
    job.tasks(USR2)
    assert job.end(0, "--link", "1", "--links", "2") == EX_LOST
    said = capsys.readouterr().err
    assert why in said and "link 2 of 2 goes on" in said
    assert job.end(0, "--link", "2", "--links", "2", "--earlier", "11") == EX_LOST
    assert "Submit again to go on from the newest checkpoint" in capsys.readouterr().err


def test_a_job_that_may_not_be_requeued_asks_for_nothing(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    job.scontrol()
    job.tasks(USR2)
    assert job.end(0, "--requeue", "no") == EX_LOST
    assert job.was_asked() == []
    assert "error: interrupted, and may not be requeued. Submit again" in capsys.readouterr().err


def test_a_done_job_is_silent(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    job.tasks(0, 0)
    assert job.end(137) == 0, "a task that had done its work and fell over on its way out"
    assert capsys.readouterr().err == ""


def test_nothing_is_begun_where_the_stage_is_finished_or_an_earlier_link_has_done_it(
    job: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    assert job.begin() == 0
    assert capsys.readouterr().out == "", "no nodes are known, so there is nowhere to meet"
    write_end(job.run, "11", 0, verdict="done", status=0, idle=False)
    assert job.begin("--link", "2", "--links", "2", "--earlier", "11") == 0
    told = capsys.readouterr()
    assert told.out == "exit 0\n" and "nothing to do: job 11 has done it." in told.err
    write_json(job.run / "stage1" / "finished.json", {"step": 3})
    assert job.begin() == 0
    assert capsys.readouterr().out == "exit 0\n"


def test_nothing_is_begun_after_a_failure_of_an_earlier_link_or_too_many_kills(
    job: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    write_end(job.run, "11", 0, verdict="failed", status=2, idle=False)
    assert job.begin("--link", "2", "--links", "2", "--earlier", "11") == 0
    told = capsys.readouterr()
    assert told.out == "exit 1\n" and "error: job 11 ended by an error of its own (status 2)" in told.err
    job.restarted(2)
    job.tasks(None, 0, restart=1)  # of start 0 nothing is known: its node went before its tasks came
    assert job.begin("--max-requeues", "1") == 0
    assert capsys.readouterr().out == "exit 1\n"
    assert job.begin("--max-requeues", "2") == 0
    assert capsys.readouterr().out == ""


def test_the_batch_script_evaluates_what_begin_prints(job: Job, tmp_path: Path) -> None:
    """With a Python that stands for the module: job.sh leaves where it is told to, and survives signals."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\ncase $3 in begin) cat "$ANSWER" ;; end) echo "$@"; exit 7 ;; esac\n')
    python.chmod(0o755)
    script = f'. {ROOT}/slurm/job.sh; job_begin --name "a b"; kill -USR2 $$; echo "at $MASTER_ADDR"; job_end 3'
    for answer, status, said in (
        (
            "export MASTER_ADDR='n 1' MASTER_PORT=7\n",
            7,
            "at n 1\n-m trainer.cluster.ending end --status 3 --name a b\n",
        ),
        ("exit 0\n", 0, ""),
        ("exit 1\n", 1, ""),
    ):
        (tmp_path / "answer").write_text(answer)
        environment = {"FMRI_FLOW_PYTHON": str(python), "ANSWER": str(tmp_path / "answer"), "PATH": "/usr/bin:/bin"}
        done = subprocess.run(["/bin/bash", "-c", script], env=environment, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout) == (status, said), done.stderr
