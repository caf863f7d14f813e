"""The chain of a pipeline without SLURM: on this machine, by submitit's local executor, or in this process.

`local` starts each job when what it waits for is met: the processes of stage 1, the worker beside it, stage 2 only if
stage 1 has finished, the report when all have ended. This process stays and drives. Ctrl-C, SIGTERM and their like are
handed to the trainings, which save at their next step; a second Ctrl-C ends everything at once. `debug` runs the same
jobs one after another in this very process, where a debugger can follow.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from submitit import DebugExecutor, LocalExecutor

from trainer.cluster.chain import Job, Outcome, next_steps, one_by_one
from trainer.cluster.plan import Plan
from trainer.cluster.records import read_records
from trainer.cluster.submission import Site
from trainer.cluster.task import Task
from trainer.cluster.waiting import guilty_task, last_lines
from trainer.run.launch import sharing, zero_environment
from trainer.run.signals import StopRequest

POLL_EVERY_S = 0.5
ASK_AGAIN_S = 2.0
"""How often processes that were asked to end are asked again: a signal that comes before their handlers is lost."""
END_WITHIN_S = 300.0
"""How long processes may take to save after a signal, until they are killed."""
_FOREVER_MIN = 60 * 24 * 365
"""submitit's local jobs have a time limit; there is none here."""

Say = Callable[[str], None]
MakeTask = Callable[..., Any]


def run_locally(plan: Plan, site: Site, *, say: Say = print, make_task: MakeTask = Task) -> int:
    """Run a chain on this machine; returns the exit status.

    Args:
        make_task: what runs in each process (tests bring their own).
    """
    plan.folder.mkdir(parents=True, exist_ok=True)
    plan.prepare()
    with StopRequest() as stop, _path_of(site.code):
        driver = Driver(plan, site, stop, say, make_task)
        return driver.run()


def run_here(plan: Plan, *, say: Say = print, make_task: MakeTask = Task) -> int:
    """Run a chain in this process, one job after the other; returns the exit status."""
    plan.folder.mkdir(parents=True, exist_ok=True)
    plan.prepare()
    jobs, outcomes = one_by_one(plan.jobs), dict[str, Outcome]()
    for job in jobs:
        outcomes |= _cancelled(jobs, outcomes, say)
        if outcomes.get(job.key) == "cancelled":
            continue
        shares = job.kind == "train" and plan.settings.of(job.name).zero_stage
        say(f"{job.key}: in this process{', which shares nothing: zero_stage does not count here' if shares else ''}")
        element = job.elements[0]
        task = make_task(element.argv, run=str(element.run), name=job.name)
        with _environment(SUBMITIT_EXECUTOR="debug"):
            try:
                DebugExecutor(plan.folder).submit(task).results()
                status: Any = 0
            except SystemExit as left:
                status = left.code
        outcomes[job.key] = "ok" if _went_well(job, status in (0, None)) else "failed"
        say(f"{job.key}: {'done' if outcomes[job.key] == 'ok' else f'failed (status {status})'}")
    return _status(outcomes)


def _went_well(job: Job, quietly: bool) -> bool:
    """Whether a job did its work; of a stage its own word counts, as an interrupted task leaves quietly too."""
    if job.kind == "train":
        return (job.elements[0].run / job.name / "finished.json").exists()
    return quietly


def _status(outcomes: Mapping[str, Outcome]) -> int:
    return 0 if all(outcome == "ok" for outcome in outcomes.values()) else 1


def _cancelled(jobs: Sequence[Job], outcomes: Mapping[str, Outcome], say: Say) -> dict[str, Outcome]:
    """What can no longer begin, with all that follows from it."""
    found: dict[str, Outcome] = {}
    while new := [key for key, step in next_steps(jobs, {**outcomes, **found}).items() if step == "cancel"]:
        for key in new:
            say(f"{key}: cancelled, as what it waits for has failed")
            found[key] = "cancelled"
    return found


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Inside the block the environment holds these."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _path_of(code: Path) -> contextlib.AbstractContextManager[None]:
    """Child processes import the code that was submitted."""
    before = os.environ.get("PYTHONPATH")
    return _environment(PYTHONPATH=os.pathsep.join([str(code), *([before] if before else [])]))


class Driver:
    """Starts the jobs of a chain as they may begin, and looks how they end."""

    def __init__(self, plan: Plan, site: Site, stop: StopRequest, say: Say, make_task: MakeTask) -> None:
        self._plan, self._site, self._stop, self._say, self._make_task = plan, site, stop, say, make_task
        self._jobs = one_by_one(plan.jobs)
        self._outcomes: dict[str, Outcome] = {}
        self._running: dict[str, Any] = {}

    def run(self) -> int:
        """Drive the chain to its end; returns the exit status."""
        while not self._stop.requested:
            self._look()
            self._outcomes |= _cancelled(self._jobs, self._outcomes, self._say)
            steps = next_steps(self._jobs, self._outcomes)
            for job in self._jobs:
                if job.key in steps and not self._is_full(job):
                    self._start(job)
            if not self._running:
                return _status(self._outcomes)
            self._stop.pause(POLL_EVERY_S)
        self._end_all()
        self._say("Ended. What was trained is kept: the same command goes on from the newest checkpoint.")
        return 128 + self._stop.signum

    def _is_full(self, job: Job) -> bool:
        """One training at a time: the machine is one."""
        kinds = {other.key: other.kind for other in self._jobs}
        return job.kind == "train" and any(kinds[key] == "train" for key in self._running)

    def _start(self, job: Job) -> None:
        settings, element = self._plan.settings.of(job.name), job.elements[0]
        tasks = 1 if job.kind == "shards" else settings.tasks_per_node  # without mpiexec each would be alone
        executor = LocalExecutor(self._plan.folder, python=shlex.quote(settings.python or self._site.python))
        executor.update_parameters(tasks_per_node=tasks, timeout_min=_FOREVER_MIN, gpus_per_node=settings.gpus)
        zero = settings.zero_stage if job.kind == "train" else None
        environment = {**_chosen_gpus(settings.gpus), **({} if zero is None else zero_environment(zero))}
        if tasks > 1 or zero:
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        task = self._make_task(element.argv, run=str(element.run), name=job.name, environment=environment)
        # the controller would kill its tasks at a Ctrl-C; ignoring is inherited, and the trainings have their handlers
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            self._running[job.key] = executor.submit(task)
        finally:
            signal.signal(signal.SIGINT, before)
        self._outcomes[job.key] = "running"
        log = self._running[job.key].paths.stdout
        size = f"{tasks} process{'es' if tasks > 1 else ''}" + (f", {sharing(tasks, zero)}" if zero else "")
        self._say(f"{job.key}: {size}, log {log}")

    def _look(self) -> None:
        """See which jobs have ended, and how."""
        for job in self._jobs:
            if job.key in self._running and self._running[job.key].done():
                process = self._running.pop(job.key)
                records = read_records(job.elements[0].run, process.job_id, 0)
                quietly = bool(records) and all(record.status == 0 for record in records)
                well = _went_well(job, quietly)
                self._outcomes[job.key] = "ok" if well else "failed"
                self._say(f"{job.key}: {'done' if well else 'failed'}")
                guilty = None if well else guilty_task(records)
                if not well:
                    rank, title = (guilty.rank, str(guilty)) if guilty else (0, "its first process")
                    for line in last_lines(self._plan.folder, process.job_id, rank, title):
                        self._say(line)

    def _end_all(self) -> None:
        """Ask all processes to end until they have; who takes too long is killed, or at a second Ctrl-C."""
        self._say(
            f"{signal.Signals(self._stop.signum).name}: the trainings save and end; Ctrl-C again ends them at once"
        )
        deadline = time.monotonic() + END_WITHIN_S
        try:
            with contextlib.suppress(KeyboardInterrupt):
                while time.monotonic() < deadline and any(not job.done() for job in self._running.values()):
                    for job in self._running.values():
                        _signal([job._process.pid], signal.SIGTERM)  # the controller hands it on
                    time.sleep(ASK_AGAIN_S)
        finally:
            for job in self._running.values():
                if not job.done():
                    _signal([*_children(job._process.pid), job._process.pid], signal.SIGKILL)
                    job._process.wait()


def _chosen_gpus(number: int) -> dict[str, str]:
    """The first of the GPUs that somebody has chosen, by number or by UUID; submitit would take the first of all."""
    chosen = [word.strip() for word in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if word.strip()]
    return {"CUDA_VISIBLE_DEVICES": ",".join(chosen[:number])} if len(chosen) >= number > 0 else {}


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
    return port


def _signal(pids: Sequence[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _children(pid: int) -> list[int]:
    """The processes that a process has started (Linux)."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
