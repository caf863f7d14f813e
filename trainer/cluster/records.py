"""What the tasks of a job leave behind about themselves, so that the batch script can tell how they ended.

    RUN/slurm/12/tasks/0.3.json    task 3 of the first start of job 12; written when it begins, and again at its end
    RUN/slurm/12/ends/0.json       what became of that start, by `trainer.cluster.ending`
    RUN/slurm/12/meeting.json      where its ranks meet, by `trainer.cluster.meeting`

The exit status of srun says little of several tasks: those that it kills because another one failed look like killed
ones. A task whose record has no status had no time to write one: it, or its node, was killed.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from trainer.run.files import read_json, write_json


@dataclass(frozen=True)
class Place:
    """Which task of which start of which job a process is."""

    job: str
    restart: int = 0
    rank: int = 0
    tasks: int = 1

    @classmethod
    def of_job(cls, environment: Mapping[str, str]) -> Place | None:
        """The job that SLURM started a batch script or a task in; None where there is none."""
        if "SLURM_JOB_ID" not in environment:
            return None
        job = environment["SLURM_JOB_ID"]
        if "SLURM_ARRAY_JOB_ID" in environment:
            job = f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
        return cls(job, int(environment.get("SLURM_RESTART_COUNT") or 0))

    @classmethod
    def of_task(cls, environment: Mapping[str, str]) -> Place | None:
        """A task that srun, or submitit on this machine, started; None where neither did."""
        if environment.get("SUBMITIT_EXECUTOR") == "local" and "SUBMITIT_LOCAL_JOB_ID" in environment:
            rank, tasks = environment.get("SUBMITIT_LOCAL_GLOBALID", "0"), environment.get("SUBMITIT_LOCAL_NTASKS", "1")
            return cls(environment["SUBMITIT_LOCAL_JOB_ID"], 0, int(rank), int(tasks))
        place = cls.of_job(environment)
        if place is None:
            return None
        rank, tasks = environment.get("SLURM_PROCID", "0"), environment.get("SLURM_STEP_NUM_TASKS", "1")
        return replace(place, rank=int(rank), tasks=int(tasks))


@dataclass(frozen=True)
class Record:
    """A task of a job: who it is and, once it has ended, its status (128 + the signal that asked it to) and why.

    `idle` says that a signal came before or after all training: nothing was won by that start.
    """

    rank: int
    tasks: int
    host: str = ""
    pid: int = 0
    began: float = 0.0
    ended: float | None = None
    status: int | None = None
    why: str = ""
    idle: bool = False

    def __str__(self) -> str:
        return f"task {self.rank} of {self.tasks} on {self.host}"


def folder_of(run: Path, job: str) -> Path:
    """Where a job keeps what it says of itself."""
    return run / "slurm" / job


class Diary:
    """Writes the record of this process's task. Without a place (no job: a test, a plain call) it writes nothing."""

    def __init__(self, run: Path, place: Place | None) -> None:
        self._path = folder_of(run, place.job) / "tasks" / f"{place.restart}.{place.rank}.json" if place else None
        self._record = Record(
            rank=place.rank if place else 0,
            tasks=place.tasks if place else 1,
            host=platform.node(),
            pid=os.getpid(),
            began=time.time(),
        )

    def begin(self) -> None:
        """Say that the task has begun."""
        self._write(self._record)

    def end(self, status: int, why: str = "", *, idle: bool = False) -> None:
        """Say how it ends, before it does: once others notice, they may have it killed."""
        self._write(replace(self._record, ended=time.time(), status=status, why=why, idle=idle))

    def _write(self, record: Record) -> None:
        if self._path is not None:
            write_json(self._path, asdict(record))


def read_records(run: Path, job: str, restart: int) -> list[Record]:
    """The records of one start of a job, by rank."""
    paths = (folder_of(run, job) / "tasks").glob(f"{restart}.*.json")
    return sorted((Record(**read_json(path)) for path in paths), key=lambda record: record.rank)


def restarts_of(run: Path, job: str) -> list[int]:
    """The starts of a job that left something behind."""
    folder = folder_of(run, job)
    names = [path.name for kind in ("tasks", "ends") for path in (folder / kind).glob("[0-9]*.json")]
    return sorted({int(name.split(".")[0]) for name in names})


def write_end(run: Path, job: str, restart: int, **facts: Any) -> None:
    """Keep what became of one start of a job."""
    write_json(folder_of(run, job) / "ends" / f"{restart}.json", {"time": time.time(), **facts})


def read_end(run: Path, job: str, restart: int) -> dict[str, Any] | None:
    """What became of one start of a job; None where its batch script did not come to say it."""
    path = folder_of(run, job) / "ends" / f"{restart}.json"
    return dict(read_json(path)) if path.exists() else None
