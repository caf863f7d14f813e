"""What SLURM says of the jobs of a run, as it says it: squeue and sacct 22.05 of a cluster printed this."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.errors import InputError
from trainer.run import jobs
from trainer.run.alive import Owner
from trainer.run.directory import StageDirectory
from trainer.run.files import read_json, write_json
from trainer.run.jobs import Job, JobState, Standing, alive, is_over, jobs_of, main, read, record, standing, states

SQUEUE = """\
1|COMPLETED|None|n1|365-00:00:00
2|FAILED|NonZeroExitCode|n1|365-00:00:00
3_0|PENDING|JobArrayTaskLimit||UNLIMITED
3_2|PENDING|JobArrayTaskLimit||UNLIMITED
4|PENDING|Dependency||1-02:00:00
3_1|RUNNING|None|n1|UNLIMITED
"""
SACCT = """\
JobID|State|ExitCode|NodeList
1|COMPLETED|0:0|n1
2|FAILED|3:0|n1
4|PENDING|0:0|None assigned
5|CANCELLED by 0|0:0|None assigned
3_0|REQUEUED|0:0|n1
3_1|RUNNING|0:0|n1
3_[1-2%1]|PENDING|0:0|None assigned
3_0|PENDING|0:0|None assigned
"""
FORGOTTEN = "slurm_load_jobs error: Invalid job id specified\n"
UNREACHABLE = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)\n"
Answer = tuple[int, str, str] | Exception
NOT_THERE = FileNotFoundError()


def slurm(squeue: Answer = NOT_THERE, sacct: Answer = NOT_THERE) -> Callable[..., Any]:
    """Stands for `subprocess.run` where squeue and sacct answer so."""
    answers: Mapping[str, Answer] = {"squeue": squeue, "sacct": sacct}

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        assert options["timeout"] <= 30
        answer = answers[command[0]]
        if isinstance(answer, Exception):
            raise answer
        return subprocess.CompletedProcess(command, *answer)

    return run


def test_squeue_is_read_as_it_prints() -> None:
    found = states(["1", "2", "3_0", "3_1", "4"], run=slurm((0, SQUEUE, "")))
    assert found == {
        "1": JobState("COMPLETED", "", "n1", "365-00:00:00"),
        "2": JobState("FAILED", "NonZeroExitCode", "n1", "365-00:00:00"),
        "3_0": JobState("PENDING", "JobArrayTaskLimit", "", "UNLIMITED"),
        "3_1": JobState("RUNNING", "", "n1", "UNLIMITED"),
        "4": JobState("PENDING", "Dependency", "", "1-02:00:00"),
    }


def test_where_there_is_no_squeue_sacct_is_read_as_it_prints() -> None:
    found = states(["2", "3_0", "3_1", "3_2", "5"], run=slurm(sacct=(0, SACCT, "")))
    assert found == {
        "2": JobState("FAILED", nodes="n1", exit_code="3:0"),
        "3_0": JobState("PENDING", exit_code="0:0"),  # requeued: the later of its two rows
        "3_1": JobState("RUNNING", nodes="n1", exit_code="0:0"),  # its own row, not that of its array
        "3_2": JobState("PENDING", exit_code="0:0"),
        "5": JobState("CANCELLED", reason="by 0", exit_code="0:0"),
    }


def test_sacct_is_asked_about_what_squeue_has_forgotten() -> None:
    both = slurm((0, SQUEUE, ""), (0, SACCT, ""))
    assert [s.state for s in states(["4", "5"], run=both).values()] == ["PENDING", "CANCELLED"]
    forgotten = slurm((1, "", FORGOTTEN), (0, SACCT, ""))
    assert states(["2"], run=forgotten)["2"].exit_code == "3:0"
    assert states(["4"], run=forgotten)["4"] == JobState(reason="sacct alone says PENDING")


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (slurm(), "squeue is not installed, sacct is not installed"),
        (slurm((0, "", "")), "SLURM does not know it"),
        (slurm(sacct=(0, SACCT, "")), "squeue is not installed, sacct does not know it"),
        (slurm((1, "", FORGOTTEN), (1, "", "Slurm accounting storage is disabled\n")), "SLURM does not know it"),
        (
            slurm((1, "", UNREACHABLE)),
            f"squeue does not answer: {UNREACHABLE.strip()}, sacct is not installed",
        ),
        (
            slurm(subprocess.TimeoutExpired("squeue", 30), PermissionError(13, "Permission denied")),
            "squeue gave no answer within 30 s, sacct cannot be run: Permission denied",
        ),
    ],
)
def test_a_state_that_nobody_can_tell_is_unknown_and_says_why(run: Callable[..., Any], reason: str) -> None:
    assert states(["7", "7_1"], run=run) == {"7": JobState(reason=reason), "7_1": JobState(reason=reason)}


def test_slurm_is_asked_by_whole_jobs_and_without_filters_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SQUEUE_PARTITION", "other")
    monkeypatch.setenv("SLURM_CLUSTERS", "east")
    asked: list[Any] = []

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        asked.append((command[-1], "SQUEUE_PARTITION" in options["env"], options["env"]["SLURM_CLUSTERS"]))
        return subprocess.CompletedProcess(command, 0, "", "")

    assert states([], run=run) == {} and states(["local"], run=run)["local"].state == "" and not asked
    states(["12_3", "12_4", "7"], run=run)
    assert asked == [("12,7", False, "east")] * 2


@given(
    st.dictionaries(st.integers(0, 40), st.sampled_from(["PENDING", "RUNNING", "FAILED"])),
    st.booleans(),
    st.integers(1, 9),
)
def test_an_array_says_of_each_element_what_is_so(elements: dict[int, str], as_ranges: bool, limit: int) -> None:
    waiting = sorted(index for index, state in elements.items() if state == "PENDING")
    rows = [f"9_{index}|{state}|0:0|n1" for index, state in elements.items() if state != "PENDING"]
    rows.append(f"9_[{ranges(waiting) if as_ranges else ','.join(map(str, waiting))}%{limit}]|PENDING|0:0|")
    found = jobs.read_sacct("\n".join(["JobID|State|ExitCode|NodeList", *rows]), [f"9_{i}" for i in range(41)])
    assert {id: state.state for id, state in found.items()} == {f"9_{i}": state for i, state in elements.items()}


def ranges(numbers: list[int]) -> str:
    """As SLURM writes lists of indices: `0-3,7`."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(f"{first}-{last}" if last > first else f"{first}" for first, last in spans)


def test_steps_and_cut_lists_of_arrays_are_read() -> None:
    rows = "9_[0-6:3,8,...]|PENDING|Resources||UNLIMITED\nnonsense\n"
    assert sorted(jobs.read_squeue(rows, [f"9_{i}" for i in range(10)])) == ["9_0", "9_3", "9_6", "9_8"]


@pytest.mark.parametrize("state", ["PENDING", "RUNNING", "COMPLETING", "REQUEUED", "SUSPENDED"])
def test_what_may_still_work_is_not_over(state: str) -> None:
    assert not is_over(JobState(state))


@pytest.mark.parametrize(
    "state",
    [
        *map(JobState, ["COMPLETED", "CANCELLED", "TIMEOUT", "NODE_FAIL", ""]),
        JobState("PENDING", "DependencyNeverSatisfied"),
    ],
)
def test_what_has_ended_or_can_never_begin_is_over(state: JobState) -> None:
    assert is_over(state)


def test_jobs_are_noted_in_their_order_and_a_known_id_is_replaced(tmp_path: Path) -> None:
    record(tmp_path, jobs_of(["stage1=1", "stage1=2", "stage1=3", "evaluate1=4", "stage2=5_2"], 9.0, "abc"))
    assert read(tmp_path)[1:] == [
        Job("stage1", "2", "train", 1, 9.0, earlier=("1",), code="abc"),
        Job("stage1", "3", "train", 1, 9.0, earlier=("1", "2"), code="abc"),
        Job("evaluate1", "4", "evaluate", 1, 9.0, code="abc"),
        Job("stage2", "5_2", "train", 2, 9.0, array=2, code="abc"),
    ]
    record(tmp_path, jobs_of(["report=4"], 10.0))
    assert [(job.name, job.id) for job in read(tmp_path)][-2:] == [("stage2", "5_2"), ("report", "4")]
    assert [path.name for path in (tmp_path / "slurm").iterdir()] == ["jobs.json"]


@pytest.mark.parametrize("word", ["stage3=1", "stage1", "stage1=Submitted batch job 1", "=1"])
def test_what_is_no_job_is_refused_and_nothing_noted(word: str, tmp_path: Path) -> None:
    assert main(["record", str(tmp_path), "stage1=1", word]) == 2
    assert read(tmp_path) == []


def test_a_damaged_list_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "jobs.json").write_text('[{"name": "stage1"}]')
    with pytest.raises(InputError, match=r"jobs\.json: is no list of jobs"):
        read(tmp_path)


@pytest.fixture
def submitted(tmp_path: Path) -> Path:
    """A run whose stages 1 and 2 were submitted an hour ago, as 3_1 and 4, after 2; and a worker of stage 1, as 3_0."""
    hour_ago = time.time() - 3600
    record(tmp_path, jobs_of(["stage1=2", "stage1=3_1", "stage2=4", "evaluate1=3_0"], hour_ago))
    return tmp_path


GONE = slurm((1, "", FORGOTTEN))


def test_a_stage_lives_while_a_training_of_it_is_in_the_queue(submitted: Path) -> None:
    listed = slurm((0, SQUEUE, ""))
    assert alive(submitted, 1, ask=listed) and alive(submitted, 2, ask=listed)
    only_worker = slurm((0, "3_0|RUNNING|None|n1|UNLIMITED\n", ""))
    assert not alive(submitted, 1, ask=only_worker)
    assert not alive(submitted, 1, ask=slurm()), "nobody can tell, and squeue will not be there later either"
    assert alive(submitted, 1, ask=slurm((1, "", UNREACHABLE))), "squeue is there, and will say later"


def test_a_job_that_sacct_has_not_heard_of_yet_lives(tmp_path: Path) -> None:
    nothing = slurm(sacct=(0, SACCT.splitlines()[0], ""))
    record(tmp_path, jobs_of(["stage1=99"], time.time()))
    assert alive(tmp_path, 1, ask=nothing)
    assert not alive(tmp_path, 1, ask=slurm((0, "", ""))), "the queue would know it, were it there"
    record(tmp_path, jobs_of(["stage1=99"], time.time() - jobs.LAG_S))
    assert not alive(tmp_path, 1, ask=nothing)


def test_the_standing_of_a_stage_follows_from_its_end_the_queue_and_its_starts(submitted: Path) -> None:
    stage = StageDirectory(submitted / "stage1")
    assert standing(submitted, 1, ask=slurm((0, SQUEUE, ""))) == Standing("running", ("3_1",))
    assert standing(submitted, 1, ask=GONE) == Standing("free")
    start = stage.begin("")
    beat = read_json(stage.path / "heartbeat.json")
    (stage.path / "heartbeat.json").unlink()
    assert standing(submitted, 1, ask=GONE) == Standing("failed", ("2", "3_1")), "this very process trains no more"
    write_json(stage.path / "heartbeat.json", {**beat, "ended": {"state": "failed", "why": "x"}, "start": start})
    assert standing(submitted, 1, ask=GONE) == Standing("failed", ("2", "3_1"))
    stage.write_finished(step=1)
    assert standing(submitted, 1, ask=slurm((0, SQUEUE, ""))) == Standing("finished")
    with pytest.raises(InputError, match=r"squeue does not answer.*Try again"):
        standing(submitted, 2, ask=slurm((1, "", UNREACHABLE)))


def test_a_training_outside_the_queue_is_running_too(tmp_path: Path) -> None:
    other = {"host": "here", "pid": os.getppid(), "machine": Owner.this().machine, "born": None, "time": 0.0}
    write_json(tmp_path / "stage1" / "starts" / "1.json", other)
    assert standing(tmp_path, 1) == Standing("running")


def test_the_shell_is_told_the_standing_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["standing", str(tmp_path), "1"]) == 0
    assert capsys.readouterr().out == "free\n"


def test_a_task_finds_the_job_that_it_is_of(submitted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    assert jobs.this_job(submitted) is None
    monkeypatch.setenv("SLURM_JOB_ID", "4")
    assert jobs.this_job(submitted) == read(submitted)[2]
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "3")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    assert jobs.this_job(submitted) == read(submitted)[1]
