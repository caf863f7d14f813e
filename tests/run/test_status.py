"""The status of a run follows from its files, whoever trains it and wherever."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from trainer.cli import main
from trainer.run import heartbeat, jobs, status
from trainer.run.directory import RunDirectory, StageDirectory, write_json
from trainer.run.files import read_json
from trainer.run.heartbeat import Heartbeat
from trainer.run.jobs import JobState, jobs_of
from trainer.run.status import StageFacts, described, described_jobs, duration, stage_status

BEAT = {
    "step": 1250,
    "total": 2000,
    "title": "Stage 1",
    "steps_per_s": 4.0,
    "time": 1000.0,
    "host": "node7",
    "pid": 12,
    "machine": "another",
    "born": 1,
    "start": 2,
    "count": 40,
}
LOG = [{"kind": "val", "step": 1200}, {"kind": "train", "step": 1225, "loss": 0.81234, "windows_per_s": 411.7}]
SCORES = [
    {"step": 600, "set": "val", "estimate": "mean", "pearson_r": 0.18341, "validation": True},
    {"step": 1200, "set": "val", "estimate": "mean", "pearson_r": 0.17, "validation": True},
    {"step": 1200, "set": "test", "estimate": "mean", "pearson_r": 0.9, "validation": False},
]
RUNNING = StageFacts("Stage 1", 1060.0, heartbeat=BEAT, lives=True, log=LOG, scores=SCORES, checkpoint=(1200, 930.0))


def ended(state: str, why: str) -> dict[str, Any]:
    return {**BEAT, "ended": {"state": state, "why": why}}


def test_a_running_stage_says_all_that_people_ask() -> None:
    assert described(stage_status(RUNNING)) == [
        "Stage 1: running, step 1250 of 2000 (62%), about 3 min left",
        "  process    12 on node7, start 2",
        "  loss       0.8123 at step 1225, 412 windows/s",
        "  best r     0.1834 on val at step 600",
        "  checkpoint step 1200, 2 min ago",
    ]


@pytest.mark.parametrize(
    ("start", "line"),
    [
        ({"world": 8, "launcher": "srun", "zero_stage": 2}, "  processes  8 of srun, ZeRO-2"),
        ({"world": 8, "launcher": "srun", "zero_stage": None}, "  processes  8 of srun, DDP"),
        ({"world": 1, "launcher": "srun", "zero_stage": 1}, "  processes  1 of srun, ZeRO-1"),
        ({"world": 8, "launcher": "srun"}, "  processes  8 of srun"),  # of an older version
        ({"world": 1, "launcher": "srun", "zero_stage": None}, None),
        ({}, None),
    ],
)
def test_how_processes_share_the_work_is_said(start: dict[str, Any], line: str | None) -> None:
    for facts in (RUNNING, replace(RUNNING, finished={"step": 600}, lives=False)):
        said = described(stage_status(replace(facts, start=start)))
        assert [words for words in said if words.startswith("  processes")] == ([line] if line else [])


@pytest.mark.parametrize(
    ("facts", "state", "why"),
    [
        (StageFacts("Stage 1", 0.0), "waiting", "not started"),
        (StageFacts("Stage 2", 0.0, waits_for="stage 1 is not finished"), "waiting", "stage 1 is not finished"),
        (RUNNING, "running", ""),
        (replace(RUNNING, lives=False), "stale", "no sign of life of process 12 on node7"),
        (replace(RUNNING, heartbeat=ended("failed", "ValueError: x"), lives=True), "failed", "ValueError: x"),
        (replace(RUNNING, heartbeat=ended("interrupted", "SIGTERM"), lives=False), "interrupted", "SIGTERM"),
        (replace(RUNNING, refit_begun=True), "finished", "its refit follows"),
        (replace(RUNNING, finished={"step": 600}, lives=False), "finished", ""),
    ],
)
def test_the_state_follows_from_heartbeat_and_end(facts: StageFacts, state: str, why: str) -> None:
    found = stage_status(facts)
    assert (found.state, found.why) == (state, why)
    assert (found.seconds_left is not None) == (state == "running")
    assert (found.owner is None) == (state in ("waiting", "finished"))


def test_a_finished_stage_says_what_was_chosen_and_a_refit_what_it_does() -> None:
    assert described(stage_status(replace(RUNNING, finished={"step": 600})))[0] == "Stage 1: finished, step 600 chosen"
    beat = {**BEAT, "title": "Stage 1 refit", "step": 30, "total": 600, "steps_per_s": None}
    facts = replace(RUNNING, title="Stage 1 refit", heartbeat=beat, log=[], scores=[], checkpoint=None)
    assert described(stage_status(facts)) == [
        "Stage 1 refit: running, step 30 of 600 (5%)",
        "  process    12 on node7, start 2",
    ]


def test_a_phase_of_its_own_is_named_and_its_steps_are_not_the_stages() -> None:
    beat = {**BEAT, "title": "Fold 2 of 5", "step": 10, "total": 600}
    found = stage_status(replace(RUNNING, title="Stage 2", heartbeat=beat))
    assert (found.phase, found.step, found.total) == ("Fold 2 of 5", 10, 600)
    assert "  now        Fold 2 of 5" in described(found)


def test_a_log_that_is_newer_than_the_beat_is_believed_and_no_beat_yet_is_no_place() -> None:
    assert stage_status(replace(RUNNING, log=[{**LOG[1], "step": 1260}])).step == 1260
    starting = replace(RUNNING, heartbeat={**BEAT, "step": 0, "total": 0, "title": ""}, log=[], scores=[])
    assert described(replace(stage_status(starting), owner=None, checkpoint=None)) == ["Stage 1: running"]


def test_r_that_is_no_number_and_stage_2_which_its_loss_chooses() -> None:
    scores = [
        {"step": s, "set": "val", "estimate": "mean", "pearson_r": r, "flow_loss": loss, "validation": True}
        for s, r, loss in ((1, 0.3, 1.5), (2, None, 1.2))
    ]
    found = stage_status(replace(RUNNING, scores=scores))
    assert found.best == ("val", 2, None)
    assert "  best r     not a number on val at step 2" in described(found)


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.4, "0 s"),
        (89, "89 s"),
        (90, "2 min"),
        (5369, "89 min"),
        (5399, "1 h 30 min"),
        (90000, "25 h 0 min"),
        (9e5, "10 d 10 h"),
    ],
)
def test_durations_are_said_as_people_say_them(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def started(run: Path, number: int, **facts: object) -> StageDirectory:
    """A stage whose newest start is of another host."""
    stage = RunDirectory(run).stage(number)
    write_json(stage.path / "starts" / "2.json", {"host": "node7", "pid": 12, "machine": "another", "born": 1})
    write_json(stage.path / "heartbeat.json", {**BEAT, "time": time.time(), **facts})
    return stage


def test_a_run_on_this_host_from_its_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stage = RunDirectory(tmp_path).stage(1)
    with Heartbeat(stage.path, stage.begin("seed: 1\n")) as pulse:
        pulse.at(1, 4, "Stage 1")
        stage.append_metrics(kind="train", step=2, loss=0.5, windows_per_s=100.0)
        (stage.checkpoints / "step_00000002").mkdir(parents=True)
        os.utime(stage.checkpoints / "step_00000002", (0, time.time() - 300))
        assert main(["status", str(tmp_path)]) == 0
        assert capsys.readouterr().out.splitlines() == [
            "Stage 1: running, step 2",  # no beat has said yet of how many
            f"  process    {os.getpid()} on {platform.node()}, start 1",
            "  loss       0.5000 at step 2, 100 windows/s",
            "  checkpoint step 2, 5 min ago",
            "Stage 2: waiting",
            "  why        stage 1 is not finished",
        ]
    (stage.path / "refit" / "logs").mkdir(parents=True)
    stage.write_finished(step=2)
    assert main(["status", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "Stage 1: finished, step 2 chosen" in out
    assert "Stage 1 refit: finished, step 2 chosen" in out
    assert "Stage 2: waiting\n  why        not started" in out


@pytest.mark.parametrize(
    "name", ["finished.json", "heartbeat.json", "starts/1.json", "scores/step_00000002-val-mean.json"]
)
@pytest.mark.parametrize("content", ["", '{"step": 2, "se', "null", "[1]"])
def test_a_file_that_is_torn_or_another_is_one_line_that_names_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: str
) -> None:
    stage = RunDirectory(tmp_path).stage(1)
    with Heartbeat(stage.path, stage.begin("seed: 1\n")):
        stage.append_metrics(kind="train", step=2, loss=0.5, windows_per_s=100.0)
    (stage.path / name).parent.mkdir(exist_ok=True)
    (stage.path / name).write_text(content)
    if name.startswith("starts"):
        (stage.path / "heartbeat.json").unlink()  # else nobody asks
    assert main(["status", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {stage.path / name}: cannot be read: found ") and error.count("\n") == 1


@pytest.mark.parametrize("age", [3, -3])
def test_a_beat_of_another_host_that_looks_young_is_believed(
    tmp_path: Path, age: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    started(tmp_path, 1, time=time.time() - age)
    monkeypatch.setattr(heartbeat, "holder", lambda *_, **__: pytest.fail("its counter was watched"))
    assert next(status.show(RunDirectory(tmp_path))).startswith("Stage 1: running, step 1250 of 2000")


@pytest.mark.parametrize("advances", [True, False])
def test_the_counter_of_a_clock_that_is_an_hour_off_is_watched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, advances: bool
) -> None:
    stage = started(tmp_path, 1, time=time.time() + 3600)
    monkeypatch.setattr(status, "WATCH_S", 0.5)
    monkeypatch.setattr(heartbeat, "LOOK_EVERY_S", 0.02)

    def look(_: float) -> None:
        sleep(0.02)
        if advances:
            beat = read_json(stage.path / "heartbeat.json")
            write_json(stage.path / "heartbeat.json", {**beat, "count": beat["count"] + 1})

    sleep = time.sleep
    monkeypatch.setattr(heartbeat.time, "sleep", look)
    first = next(status.show(RunDirectory(tmp_path)))
    assert first.startswith("Stage 1: running" if advances else "Stage 1: stale")


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(tmp_path / "nowhere")]) == 2
    assert main(["status", str(tmp_path)]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert "nowhere: no such run directory" in first
    assert "holds no training: expected a run directory with stage1/" in second


def test_status_is_told_without_torch(tmp_path: Path) -> None:
    started(tmp_path, 1)
    told = "import sys; from trainer.cli import main; main(sys.argv[1:]); print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", told, "status", str(tmp_path)], capture_output=True, text=True).stdout
    assert out.startswith("Stage 1: running")
    assert out.endswith("False\n")


def test_the_jobs_of_a_run_are_told_in_a_line_each() -> None:
    submitted = jobs_of(["shards=9", "stage1=10", "stage1=12", "stage2=13", "report=14", "evaluate1=15"], 0.0)
    states = {
        "9": JobState("FAILED", "NonZeroExitCode", "n1", "23:00", "3:0"),
        "10": JobState("FAILED", "NonZeroExitCode"),
        "12": JobState("RUNNING", "", "n[1-2]", "1-02:00:00"),
        "13": JobState("PENDING", "Dependency", "", "1-00:00:00"),
        "14": JobState("COMPLETED", "", "n1", "1:00", "0:0"),
        "15": JobState(reason="SLURM does not know it"),
    }
    assert described_jobs(submitted, states, 60.0) == [
        "Jobs",
        "  shards     9   FAILED     n1, NonZeroExitCode, 3:0",
        "  stage1     12  RUNNING    n[1-2], 1-02:00:00 left",
        "  stage2     13  PENDING    Dependency",
        "  report     14  COMPLETED  n1",
        "  evaluate1  15  unknown    SLURM does not know it",
    ]


def test_links_that_wait_and_elements_of_arrays_are_all_told() -> None:
    submitted = jobs_of(["stage1=1", "stage1=2", "stage1=3", "stage2=4_0", "stage2=4_1"], 0.0)
    states = {job.id: JobState("CANCELLED" if job.id in ("1", "4_0") else "PENDING") for job in submitted}
    assert [line.split()[1:] for line in described_jobs(submitted, states, 0.0)[1:]] == [
        ["2", "PENDING"],
        ["3", "PENDING"],
        ["4_0", "CANCELLED"],
        ["4_1", "PENDING"],
    ]


def test_a_run_that_only_waits_in_the_queue_and_whose_queue_is_not_here(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    jobs.record(tmp_path, jobs_of(["stage1=12", "stage2=13"], time.time() - 7200))
    assert main(["status", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "Stage 1: waiting",
        "  why        not started",
        "Stage 2: waiting",
        "  why        stage 1 is not finished",
        "Jobs: states unknown (squeue is not installed, sacct is not installed)",
        "  stage1  12  submitted 2 h 0 min ago",
        "  stage2  13  submitted 2 h 0 min ago",
    ]
