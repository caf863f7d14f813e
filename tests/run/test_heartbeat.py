"""One training owns a stage directory: a second is refused while it lives, and takes over as soon as it is dead."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given

from tests.links import NO_LINKS
from tests.pipes import line, tell
from trainer.errors import InputError
from trainer.run import heartbeat
from trainer.run.alive import Owner
from trainer.run.files import write_json
from trainer.run.heartbeat import Heartbeat, Pace, begin, holder, is_over, read_heartbeat
from trainer.run.processes import Interrupted

TRAIN = """
import sys
from pathlib import Path
from trainer.errors import InputError
from trainer.run.heartbeat import Heartbeat, begin
folder = Path(sys.argv[1])
try:
    print("ready", flush=True)
    sys.stdin.readline()
    with Heartbeat(folder, begin(folder, {})) as pulse:
        pulse.at(7, 20, "Stage 1")
        print("begun", flush=True)
        sys.stdin.readline()
except InputError as error:
    print(error, flush=True)
"""
Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "BEAT_EVERY_S", 0.02)
    monkeypatch.setattr(heartbeat, "STALE_AFTER_S", 1.0)
    monkeypatch.setattr(heartbeat, "LOOK_EVERY_S", 0.02)


@pytest.fixture
def training(tmp_path: Path) -> Iterator[Start]:
    """Starts processes that train in `tmp_path` as soon as they are given a line."""
    processes = []

    def start(links: bool = True) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", TRAIN if links else NO_LINKS + TRAIN, str(tmp_path)]
        process = subprocess.Popen(command, stdin=-1, stdout=-1, text=True)
        processes.append(process)
        assert line(process) == "ready"
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def elsewhere(folder: Path, number: int, **facts: object) -> None:
    """Files of a start on another host, whose clock is an hour ahead."""
    owner = {"host": "node7", "pid": 12, "machine": "another", "born": 1}
    beat = {"step": 7, "total": 20, "title": "Stage 1", "time": time.time() + 3600, "start": number, "count": 0}
    write_json(folder / "starts" / f"{number}.json", owner)
    write_json(folder / "heartbeat.json", {**beat, **owner, **facts})


def until(condition: Callable[[], bool]) -> None:
    for _ in range(500):
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError("it never happened")


def test_a_second_training_is_refused_until_the_first_is_killed(tmp_path: Path, training: Start) -> None:
    first = training()
    tell(first)
    assert line(first) == "begun"
    expected = (
        rf"another training runs there: found process {first.pid} on {platform.node()} .*status .*kill {first.pid}"
    )
    with pytest.raises(InputError, match=expected):
        begin(tmp_path, {})
    first.kill()
    os.waitid(os.P_PID, first.pid, os.WEXITED | os.WNOWAIT)
    assert begin(tmp_path, {"world": 1}) == 2  # a zombie, too, is dead
    assert json.loads((tmp_path / "starts" / "2.json").read_text())["world"] == 1


@pytest.mark.parametrize("links", [4, 2, 0], ids=["hard links", "hard links for half of them", "no hard links"])
def test_of_those_that_start_at_once_one_trains(tmp_path: Path, training: Start, links: int) -> None:
    processes = [training(links=i < links) for i in range(4)]
    for process in processes:
        tell(process)
    answers = sorted(line(process) for process in processes)
    assert answers[-1] == "begun"
    assert all("another training runs there" in answer for answer in answers[:-1])
    assert [path.name for path in (tmp_path / "starts").iterdir()] == ["1.json"]


def test_a_start_whose_maker_died_before_it_had_written_is_followed_when_it_stays_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without hard links a start is there before its text is."""
    (tmp_path / "starts").mkdir()
    (tmp_path / "starts" / "1.json").touch()
    assert holder(tmp_path, patience_s=0) is not None, "who does not wait must take it for living"
    assert begin(tmp_path, {}) == 2
    assert "waiting up to 1 s for a sign of life of process 0 on a host that has not said its name" in (
        capsys.readouterr().err
    )


def test_a_start_that_is_being_made_is_waited_for(tmp_path: Path) -> None:
    (tmp_path / "starts").mkdir()
    (tmp_path / "starts" / "1.json").touch()
    writer = threading.Timer(0.2, lambda: elsewhere(tmp_path, 1))
    writer.start()
    found = holder(tmp_path)
    writer.join()
    assert found is not None and found["host"] == "node7"


def test_a_training_holds_its_directory_whatever_the_file_system_says_of_inodes_and_times(tmp_path: Path) -> None:
    """FUSE mounts and FAT number a file anew when nobody has looked at it for a while."""
    with Heartbeat(tmp_path, begin(tmp_path, {})) as pulse:
        path = tmp_path / "starts" / "1.json"
        text = path.read_text()
        (tmp_path / "starts" / ".copy").write_text(text)
        (tmp_path / "starts" / ".copy").replace(path)
        os.utime(path, (1, 1))
        count = json.loads((tmp_path / "heartbeat.json").read_text())["count"]
        until(lambda: json.loads((tmp_path / "heartbeat.json").read_text())["count"] > count + 2)
        assert not pulse.superseded


def test_a_training_that_has_ended_is_followed_at_once(tmp_path: Path, training: Start) -> None:
    first = training()
    tell(first)
    assert line(first) == "begun"
    tell(first)
    first.wait()
    assert holder(tmp_path) is None
    elsewhere(tmp_path, 2, ended={"state": "interrupted", "why": "SIGTERM at step 7"})
    assert begin(tmp_path, {}) == 3


def test_a_training_on_another_host_lives_while_its_counter_advances(tmp_path: Path) -> None:
    elsewhere(tmp_path, 1)
    stop = threading.Event()

    def beat() -> None:
        count = 0
        while not stop.wait(0.05):
            elsewhere(tmp_path, 1, count=(count := count + 1))

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(InputError, match=r"found process 12 on node7 \(Stage 1, step 7 of 20\)"):
            begin(tmp_path, {})
    finally:
        stop.set()
        thread.join()
    assert holder(tmp_path, patience_s=0) is not None  # who does not wait must take it for living


@pytest.mark.parametrize("said_something", [True, False])
def test_a_training_on_another_host_is_dead_when_its_counter_stands_still(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], said_something: bool
) -> None:
    elsewhere(tmp_path, 1)
    if not said_something:
        (tmp_path / "heartbeat.json").unlink()
    assert begin(tmp_path, {}) == 2
    assert capsys.readouterr().err.count("waiting up to 1 s for a sign of life of process 12 on node7") == 1


def test_a_job_that_slurm_starts_again_does_not_wait_for_its_last_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heartbeat, "STALE_AFTER_S", 3600.0)
    elsewhere(tmp_path, 1)
    write_json(tmp_path / "starts" / "1.json", {**read_heartbeat(tmp_path), "slurm": {"SLURM_JOB_ID": "12"}})
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    assert holder(tmp_path, patience_s=0) is not None, "the same start: it lives as far as can be seen"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert holder(tmp_path) is None
    assert begin(tmp_path, {}) == 2


@pytest.mark.parametrize(
    ("start", "environment", "over"),
    [
        ({"SLURM_JOB_ID": "12", "SLURM_RESTART_COUNT": "1"}, {"SLURM_JOB_ID": "12", "SLURM_RESTART_COUNT": "2"}, True),
        ({"SLURM_JOB_ID": "12", "SLURM_RESTART_COUNT": "2"}, {"SLURM_JOB_ID": "12", "SLURM_RESTART_COUNT": "2"}, False),
        ({"SLURM_JOB_ID": "12", "SLURM_RESTART_COUNT": "2"}, {"SLURM_JOB_ID": "12"}, False),
        ({"SLURM_JOB_ID": "12"}, {"SLURM_JOB_ID": "13", "SLURM_RESTART_COUNT": "1"}, False),
        ({"SLURM_JOB_ID": "12"}, {"SLURM_JOB_ID": "14", "FMRI_FLOW_EARLIER": "12 13"}, True),
        ({"SLURM_JOB_ID": "1"}, {"SLURM_JOB_ID": "14", "FMRI_FLOW_EARLIER": "12 13"}, False),
        (
            {"SLURM_JOB_ID": "21", "SLURM_ARRAY_JOB_ID": "20", "SLURM_ARRAY_TASK_ID": "3"},
            {"SLURM_JOB_ID": "31", "FMRI_FLOW_EARLIER": "20_3"},
            True,
        ),
        ({}, {"SLURM_JOB_ID": "14", "FMRI_FLOW_EARLIER": "None_None"}, False),
    ],
)
def test_a_start_is_over_where_slurm_says_so(start: dict[str, str], environment: dict[str, str], over: bool) -> None:
    assert is_over(start, environment) == over


def test_beats_go_on_while_the_training_is_busy(tmp_path: Path) -> None:
    counts = []
    with Heartbeat(tmp_path, begin(tmp_path, {})) as pulse:
        pulse.at(5, 20, "Stage 1")
        until(lambda: (read_heartbeat(tmp_path) or {})["step"] == 5)
        for _ in range(200):  # whole at every moment, and never backwards
            beat = json.loads((tmp_path / "heartbeat.json").read_text())
            counts.append(beat["count"])
        until(lambda: json.loads((tmp_path / "heartbeat.json").read_text())["count"] > counts[-1])
    assert counts == sorted(counts)
    beat = json.loads((tmp_path / "heartbeat.json").read_text())
    assert (beat["step"], beat["total"], beat["title"], beat["start"]) == (5, 20, "Stage 1", 1)
    assert (beat["host"], beat["pid"]) == (platform.node(), os.getpid())
    assert beat["ended"] == {"state": "finished", "why": ""}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["heartbeat.json", "starts"]


@pytest.mark.parametrize(
    ("error", "state", "why"),
    [
        (Interrupted(15, 7), "interrupted", "SIGTERM at step 7; the checkpoint is written"),
        (KeyboardInterrupt(), "interrupted", "KeyboardInterrupt"),
        (InputError("shards", "are gone"), "failed", "shards: are gone"),
        (ValueError("a\nb"), "failed", "ValueError: a b"),
    ],
)
def test_how_a_training_ended_is_said(tmp_path: Path, error: BaseException, state: str, why: str) -> None:
    with pytest.raises(type(error)), Heartbeat(tmp_path, begin(tmp_path, {})):
        raise error
    assert json.loads((tmp_path / "heartbeat.json").read_text())["ended"] == {"state": state, "why": why}


def test_a_training_that_was_taken_for_dead_learns_it_and_writes_no_more(tmp_path: Path) -> None:
    with Heartbeat(tmp_path, begin(tmp_path, {})) as pulse:
        assert not pulse.superseded
        elsewhere(tmp_path, 2)
        until(lambda: pulse.superseded)
        elsewhere(tmp_path, 2)
    assert json.loads((tmp_path / "heartbeat.json").read_text())["host"] == "node7"


@pytest.mark.parametrize("again", [True, False])
def test_a_training_whose_directory_was_deleted_does_not_write_into_the_next_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    monkeypatch.setattr(heartbeat, "BEAT_EVERY_S", 60)  # only the last beat finds it
    with Heartbeat(tmp_path / "stage1", begin(tmp_path / "stage1", {})) as pulse:
        (tmp_path / "stage1").rename(tmp_path / "deleted")
        if again:
            elsewhere(tmp_path / "stage1", 1)
    assert pulse.superseded
    assert (tmp_path / "stage1").exists() == again
    if again:
        assert json.loads((tmp_path / "stage1" / "heartbeat.json").read_text())["host"] == "node7"


def test_a_full_disk_is_said_once_and_ends_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        tried.append(1)
        raise OSError(28, "No space left on device")

    tried: list[int] = []
    with Heartbeat(tmp_path, begin(tmp_path, {})):
        monkeypatch.setattr(heartbeat, "write_json", full)
        until(lambda: len(tried) > 3)
    assert capsys.readouterr().err.count("heartbeat.json cannot be written: [Errno 28] No space left") == 1


def test_what_killed_writers_left_is_removed(tmp_path: Path) -> None:
    begin(tmp_path, {})
    (tmp_path / ".heartbeat.json.99").write_text("{")
    assert begin(tmp_path, {}) == 2
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["1.json", "2.json", "heartbeat.json", "starts"]


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 5)), min_size=1, max_size=20))
def test_the_pace_is_that_of_the_last_sights(sights: list[tuple[int, int]]) -> None:
    pace, step, now, seen = Pace(sights=4), 0, 0, []
    for gained, waited in sights:
        step, now = step + gained, now + waited
        seen.append((now, step))
        (first, start), (last, end) = seen[-4:][0], seen[-1]
        expected = (end - start) / (last - first) if end > start else None
        assert pace.saw("Stage 1", step, now) == expected


def test_the_pace_of_another_phase_or_of_a_step_back_begins_anew() -> None:
    pace = Pace()
    assert [pace.saw("Stage 1", step, step) for step in (0, 1, 2)] == [None, 1.0, 1.0]
    assert [pace.saw("Stage 1 refit", step, 3 + step) for step in (2, 4)] == [None, 1.0]
    assert [pace.saw("Stage 1 refit", step, 9 + step) for step in (1, 2)] == [None, 1.0]


def test_the_owner_is_written_as_it_is_read(tmp_path: Path) -> None:
    begin(tmp_path, {})
    beat = read_heartbeat(tmp_path)
    assert beat is not None
    assert Owner.read(beat) == Owner.this()
