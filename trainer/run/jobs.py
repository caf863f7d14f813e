"""Which jobs of SLURM were submitted for a run, and what has become of them.

    RUN/slurm/jobs.json    a list of jobs, in the order of their submission; whoever submits adds to it

Nothing here needs SLURM: a run is looked at from a laptop too, where neither squeue nor sacct is installed. Their
answers are read by pure functions; every call of them is bounded, since a controller that is down lets them wait for
minutes. From a shell:

    python -m trainer.run.jobs record RUN stage1=12 stage2=13 evaluate1=14 report=15
    python -m trainer.run.jobs standing RUN 1        prints `free`, `running 12`, `finished` or `failed`

What squeue lists is believed: it asks the controller. sacct asks a database that hears of things seconds later, and
keeps rows of jobs that the controller has lost as running for ever; so of a job that squeue does not list sacct is
believed only about its end. Where there is no squeue, sacct's word is taken as it is.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

from trainer.errors import InputError, exit_on_input_error
from trainer.run import heartbeat
from trainer.run.code import ROOT, sha256
from trainer.run.directory import RunDirectory
from trainer.run.files import read_json, write_json

WAIT_S = 30.0
"""How long squeue or sacct may take."""
LAG_S = 60.0
"""How long after its submission a job that nobody knows counts as living: sacct hears of it late."""

NAMES: Mapping[str, tuple[str, int | None]] = {
    "shards": ("shards", None),
    "stage1": ("train", 1),
    "stage2": ("train", 2),
    "evaluate1": ("evaluate", 1),
    "evaluate2": ("evaluate", 2),
    "report": ("report", None),
}
"""What a job may be called, and of what kind and stage it then is."""


@dataclass(frozen=True)
class Job:
    """A job that was submitted for a run.

    Attributes:
        name: a key of `NAMES`.
        id: SLURM's; of an element of an array `12_3`.
        kind: `shards`, `train`, `evaluate` or `report`.
        stage: 1, 2, or None where it belongs to no stage.
        time: of the submission, in seconds since 1970.
        earlier: ids of the links before this one, where it takes over if they end too soon.
        array: the index in the array.
        code: SHA-256 of the code at the submission (`trainer.run.code`); empty where nobody noted it.
    """

    name: str
    id: str
    kind: str
    stage: int | None
    time: float
    earlier: tuple[str, ...] = ()
    array: int | None = None
    code: str = ""


@dataclass(frozen=True)
class JobState:
    """What SLURM says of a job.

    Attributes:
        state: in SLURM's long form (PENDING, RUNNING, COMPLETED, CANCELLED, ...); empty where nobody knows.
        reason: why it waits, or ended; of an unknown state, why it is unknown.
        nodes: as SLURM writes lists of them: `n[1-2]`.
        left: time until its limit: `1-02:00:00`.
        exit_code: `3:0`, status and signal; empty where only squeue was asked.
    """

    state: str = ""
    reason: str = ""
    nodes: str = ""
    left: str = ""
    exit_code: str = ""


class Standing(NamedTuple):
    """How a stage stands for who would submit it: `free` to begin, or `failed`, free to be continued."""

    state: Literal["free", "running", "finished", "failed"]
    ids: tuple[str, ...] = ()


Run = Callable[..., "subprocess.CompletedProcess[str]"]


# The list of jobs


def record(run: Path, jobs: Sequence[Job]) -> None:
    """Add to the jobs of a run, whole or not at all; one of a known id replaces what was said of it."""
    new = {job.id for job in jobs}
    known = [job for job in read(run) if job.id not in new]
    write_json(_path(run), [asdict(job) for job in [*known, *jobs]])


def forget(run: Path, ids: Collection[str]) -> None:
    """Take jobs out of the list again, where SLURM has refused what belonged to them."""
    known = read(run)
    kept = [job for job in known if job.id not in ids]
    if known and not kept:
        _path(run).unlink()
    elif len(kept) < len(known):
        write_json(_path(run), [asdict(job) for job in kept])


def read(run: Path) -> list[Job]:
    """The jobs that were submitted for a run, oldest first.

    Raises:
        InputError: the list is damaged.
    """
    path = _path(run)
    if not path.exists():
        return []
    entries = read_json(path)
    try:
        return [Job(**{**entry, "earlier": tuple(entry.get("earlier", ()))}) for entry in entries]
    except (TypeError, AttributeError) as error:
        raise InputError(
            path, "is no list of jobs", found=error, fix="Delete it, if no job of the run is left."
        ) from error


def _path(run: Path) -> Path:
    return run / "slurm" / "jobs.json"


def this_job(run: Path) -> Job | None:
    """The job in whose tasks we run, where it was recorded for the run."""
    array, index = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    mine = f"{array}_{index}" if array and index else os.environ.get("SLURM_JOB_ID")
    return next((job for job in read(run) if job.id == mine), None) if mine else None


def other_code(run: Path) -> str | None:
    """A warning that the code is not the one that our job was submitted with; None where it is, or nobody noted it."""
    job = this_job(run)
    if job is None or not job.code or job.code == sha256():
        return None
    fix = "Submit with --snapshot to run what is submitted."
    return f"{ROOT}: the code has changed since job {job.id} was submitted; starts/ notes what runs. {fix}"


# What SLURM says

_ID = re.compile(r"\d+(_\d+)?")
_ARRAY = re.compile(r"(\d+)_\[([^\]]*)\]?")
_RANGE = re.compile(r"(\d+)(?:-(\d+)(?::(\d+))?)?")
_LIVE = {
    *("PENDING", "CONFIGURING", "RUNNING", "SUSPENDED", "STOPPED", "COMPLETING", "STAGE_OUT", "SIGNALING", "RESIZING"),
    *("REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT"),
}
_NEVER = "DependencyNeverSatisfied"
_SQUEUE_FIELDS = ("id", "state", "reason", "nodes", "left")


def states(ids: Sequence[str], *, run: Run = subprocess.run) -> dict[str, JobState]:
    """What squeue, and of those that it has forgotten sacct, says of jobs. Neither is needed.

    Args:
        ids: of jobs, or of elements of arrays.
        run: `subprocess.run`, or what stands for it in a test.
    """
    return _ask(ids, run).states


def is_over(state: JobState) -> bool:
    """Whether a job will do no more: it has ended, SLURM knows nothing of it, or it waits for what cannot come."""
    return state.state not in _LIVE or _NEVER in state.reason


def living(ids: Sequence[str], *, ask: Run = subprocess.run) -> tuple[tuple[str, ...], str]:
    """Which jobs, elements of arrays one by one, are not over; and why there may be others, as of `in_queue`."""
    answer = _ask(ids, ask)
    return tuple(id for id in ids if not is_over(answer.states[id])), answer.trouble


def alive(run: Path, stage: int, *, ask: Run = subprocess.run) -> bool:
    """Whether a training of a stage is, or will be, in some job of the queue; also while squeue fails to answer.

    A worker that scores the stage does not count: it asks this to learn whether there will be more to score.
    """
    ids, trouble = in_queue(run, stage, ask=ask)
    return bool(ids or trouble)


def in_queue(run: Path, stage: int | None = None, *, ask: Run = subprocess.run) -> tuple[tuple[str, ...], str]:
    """The ids of a run's jobs that are not over, or of the trainings of one stage among them.

    Returns: the ids, and why there may be others: squeue is here, but did not answer.
    """
    jobs = read(run) if stage is None else _trainings(run, stage)
    answer = _ask([job.id for job in jobs], ask)
    now = time.time()

    def lives(job: Job) -> bool:
        state = answer.states[job.id]
        # the queue knows a job from its first moment on, sacct does not
        late = not answer.queue and not state.state and now - job.time < LAG_S
        return late or not is_over(state)

    return tuple(job.id for job in jobs if lives(job)), answer.trouble


def standing(run: Path, stage: int, *, ask: Run = subprocess.run) -> Standing:
    """How a stage stands: finished, in the queue, trained by somebody outside of it, ended before its end, or free.

    Raises:
        InputError: jobs were submitted for it, and squeue is here but does not answer.
    """
    directory = RunDirectory(run).stage(stage)
    if directory.finished() is not None:
        return Standing("finished")
    ids, trouble = in_queue(run, stage, ask=ask)
    if ids:
        return Standing("running", ids)
    if trouble:
        fix = "Try again: whether a job of this stage is in the queue decides what is to be done."
        raise InputError(run, trouble, fix=fix)
    if heartbeat.holder(directory.path) is not None:
        return Standing("running")
    ended = tuple(job.id for job in _trainings(run, stage))
    return Standing("failed", ended) if directory.has_started() else Standing("free")


def _trainings(run: Path, stage: int) -> list[Job]:
    return [job for job in read(run) if job.kind == "train" and job.stage == stage]


class _Answer(NamedTuple):
    """What SLURM said: `states`; whether the `queue` itself was heard; and, where jobs may live of which nothing is
    known because squeue is here but did not answer, that `trouble`."""

    states: dict[str, JobState]
    queue: bool
    trouble: str


def _ask(ids: Sequence[str], run: Run) -> _Answer:
    """Ask squeue, and sacct about what it does not know."""
    wanted = [id for id in dict.fromkeys(ids) if _ID.fullmatch(id)]
    listed, no_squeue = _answer(_squeue(wanted), run) if wanted else ("", "")
    found = read_squeue(listed or "", wanted)
    missing = [id for id in wanted if id not in found]
    recorded, no_sacct = _answer(_sacct(missing), run) if missing else ("", "")
    for id, state in read_sacct(recorded or "", missing).items():
        lost = listed is not None and state.state in _LIVE
        found[id] = JobState(reason=f"sacct alone says {state.state}") if lost else state
    why = "SLURM does not know it" if listed is not None else f"{no_squeue}, {no_sacct or 'sacct does not know it'}"
    trouble = no_squeue if no_squeue != _missing("squeue") and not found.keys() >= set(wanted) else ""
    return _Answer({id: found.get(id, JobState(reason=why)) for id in ids}, listed is not None, trouble)


def _squeue(ids: Sequence[str]) -> list[str]:
    # asked by the jobs, not by the elements of arrays: of an element that it forgot it says that the id is wrong
    return ["squeue", "-h", "-r", "-a", "-t", "all", "-o", "%i|%T|%r|%N|%L", "-j", ",".join(_bases(ids))]


def _sacct(ids: Sequence[str]) -> list[str]:
    return ["sacct", "-X", "-P", "--format=JobID,State,ExitCode,NodeList", "-j", ",".join(_bases(ids))]


def _bases(ids: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(id.partition("_")[0] for id in ids))


def _missing(name: str) -> str:
    return f"{name} is not installed"


def _answer(command: Sequence[str], run: Run) -> tuple[str | None, str]:
    """What a program of SLURM prints, bounded in time; None where it could not answer, and why."""
    name = command[0]
    # e.g. SQUEUE_PARTITION would hide jobs, and SQUEUE_SORT is none of our business
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("SQUEUE_", "SACCT_"))}
    try:
        done = run(list(command), capture_output=True, text=True, timeout=WAIT_S, env=clean, errors="replace")
    except FileNotFoundError:
        return None, _missing(name)
    except subprocess.TimeoutExpired:
        return None, f"{name} gave no answer within {WAIT_S:g} s"
    except OSError as error:
        return None, f"{name} cannot be run: {error.strerror}"
    if done.returncode == 0 or "Invalid job id specified" in done.stderr:  # so it says when it has forgotten them
        return done.stdout, ""
    last = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
    return None, f"{name} does not answer: {last}"


def read_squeue(text: str, ids: Collection[str]) -> dict[str, JobState]:
    """The states of jobs in what `squeue -h -o '%i|%T|%r|%N|%L'` prints."""
    rows = [dict(zip(_SQUEUE_FIELDS, line.split("|"), strict=False)) for line in text.splitlines()]
    return _of_jobs([row for row in rows if len(row) == len(_SQUEUE_FIELDS)], ids)


def read_sacct(text: str, ids: Collection[str]) -> dict[str, JobState]:
    """The states of jobs in what `sacct -P` prints, read by the names of its columns."""
    lines = [line.split("|") for line in text.splitlines()]
    if not lines:
        return {}
    names = {"JobID": "id", "State": "state", "ExitCode": "exit_code", "NodeList": "nodes"}
    header = [names.get(name, name) for name in lines[0]]
    return _of_jobs([dict(zip(header, line, strict=False)) for line in lines[1:] if len(line) == len(header)], ids)


def _of_jobs(rows: Sequence[Mapping[str, str]], ids: Collection[str]) -> dict[str, JobState]:
    """Rows by job; of several about one, as a requeue leaves them in sacct, the last counts.

    A job's own row counts before that of the waiting part of its array, from which sacct strikes it out too late.
    """
    found: dict[str, JobState] = {}
    fields = ("state", "reason", "nodes", "left", "exit_code")
    for row in sorted(rows, key=lambda row: "[" not in row["id"]):
        state = JobState(**{name: _said(row.get(name, "")) for name in fields})
        word, _, by = state.state.partition(" ")  # CANCELLED by 1000
        state = replace(state, state=word.rstrip("+"), reason=state.reason or by)
        found.update({id: state for id in _elements(row["id"]) if id in ids})
    return found


def _said(text: str) -> str:
    """A cell, where it is not one of SLURM's ways to say nothing."""
    text = text.strip()
    return "" if text in ("None", "None assigned", "N/A", "(null)", "INVALID", "NOT_SET") else text


def _elements(id: str) -> Iterator[str]:
    """The jobs that an id of SLURM means: `12`, `12_3`, and of waiting elements `12_[0-3,7%2]`."""
    array = _ARRAY.fullmatch(id)
    if array is None:
        yield id
        return
    for part in array[2].partition("%")[0].split(","):
        if (span := _RANGE.fullmatch(part)) is not None:  # a long list ends in `...`
            first, last, step = int(span[1]), int(span[2] or span[1]), int(span[3] or 1)
            yield from (f"{array[1]}_{index}" for index in range(first, last + 1, step))


# The command line


@exit_on_input_error
def main(argv: Sequence[str] | None = None) -> int:
    """`record` or `standing`; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m trainer.run.jobs", description="The jobs of a run.")
    commands = parser.add_subparsers(required=True, dest="command", metavar="COMMAND")
    recorder = commands.add_parser("record", help="note which jobs were submitted for a run")
    recorder.add_argument("run", type=Path, metavar="DIR", help="run directory")
    recorder.add_argument("jobs", nargs="+", metavar="NAME=ID", help="e.g. stage1=12; links of one name in their order")
    recorder.add_argument("--code", default="", metavar="SHA256", help="of the code that they are to run")
    asker = commands.add_parser("standing", help="say how a stage stands: free, running IDS, finished or failed IDS")
    asker.add_argument("run", type=Path, metavar="DIR", help="run directory")
    asker.add_argument("stage", type=int, choices=[1, 2], help="which stage")
    arguments = parser.parse_args(argv)
    if arguments.command == "record":
        record(arguments.run, jobs_of(arguments.jobs, time.time(), arguments.code))
    else:
        found = standing(arguments.run, arguments.stage)
        print(" ".join([found.state, *found.ids]))
    return 0


def jobs_of(words: Sequence[str], now: float, code: str = "") -> list[Job]:
    """`NAME=ID` as jobs; of several of one name each later one is a link that takes over from those before.

    Raises:
        InputError: no such name, or no id of SLURM.
    """
    jobs: list[Job] = []
    for word in words:
        name, _, id = word.partition("=")
        if name not in NAMES or not _ID.fullmatch(id):
            names = ", ".join(NAMES)
            raise InputError(word, "is no job", expected=f"NAME=ID with one of {names}, and the id that sbatch printed")
        kind, stage = NAMES[name]
        index = id.partition("_")[2]
        earlier = tuple(job.id for job in jobs if job.name == name and not index)
        jobs.append(Job(name, id, kind, stage, now, earlier, int(index) if index else None, code))
    return jobs


if __name__ == "__main__":
    sys.exit(main())
