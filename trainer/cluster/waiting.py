"""`--wait`: watch the jobs of a chain until all are over, and say how it went.

SLURM is asked every few seconds, each time bounded. What the states mean is a function of them. A stage that is several
links went as its last one did; a job that failed is shown with the last lines of the task that is the cause.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.cluster.chain import Job
from trainer.cluster.ending import is_own_error
from trainer.cluster.records import Record, read_records, restarts_of
from trainer.run import jobs as queue
from trainer.run.jobs import JobState
from trainer.run.signals import StopRequest

POLL_EVERY_S = 5.0
FORGOTTEN_AFTER_S = 90.0
"""A job of which SLURM knows nothing for so long is over: it was purged, or there is no accounting."""
LAST_LINES = 20

Ask = Callable[[Sequence[str]], Mapping[str, JobState]]


@dataclass(frozen=True)
class Part:
    """A job of SLURM that is waited for: a job of the chain, or an element of an array."""

    key: str
    name: str
    id: str
    run: Path
    logs: Path
    last: bool = True

    @property
    def finished(self) -> bool:
        """Whether the stage that it trains is finished, whatever SLURM says of the job."""
        return self.name.startswith("stage") and (self.run / self.name / "finished.json").exists()


def parts_of(jobs: Sequence[Job], ids: Mapping[str, str], folder: Path) -> list[Part]:
    """The jobs of SLURM that a chain has become."""
    parts = []
    for job in jobs:
        for index, element in enumerate(job.elements):
            many = len(job.elements) > 1
            job_id = f"{ids[job.key]}_{index}" if many else ids[job.key]
            name = f"{job.key}[{element.run.name}]" if many else job.key
            parts.append(Part(name, job.name, job_id, element.run, folder, job.link == job.links))
    return parts


@dataclass(frozen=True)
class Verdict:
    """How a chain went: the jobs that failed, in the order of the chain, and those that were cancelled."""

    failed: list[Part]
    cancelled: list[Part]

    @property
    def status(self) -> int:
        """The exit status."""
        return 1 if self.failed or self.cancelled else 0


def verdict(parts: Sequence[Part], states: Mapping[str, JobState]) -> Verdict:
    """What the last states mean. A link that was followed by another one counts for nothing by itself."""
    last = [part for part in parts if part.last and not part.finished]
    cancelled = [part for part in last if was_cancelled(states[part.id])]
    failed = [part for part in last if part not in cancelled and went_wrong(part, states[part.id])]
    return Verdict(failed, cancelled)


def was_cancelled(state: JobState) -> bool:
    """Whether a job was cancelled, by a person or since what it waited for cannot come."""
    return state.state == "CANCELLED" or "DependencyNeverSatisfied" in state.reason


def went_wrong(part: Part, state: JobState) -> bool:
    """Whether a job that is over did not do its work; of a forgotten one its records tell."""
    if state.state:
        return state.state != "COMPLETED"
    starts = restarts_of(part.run, part.id)
    return not starts or any(record.status != 0 for record in read_records(part.run, part.id, starts[-1]))


def wait(parts: Sequence[Part], *, ask: Ask = queue.states, say: Callable[[str], None] = print) -> int:
    """Wait until all are over, saying what changes; returns the exit status.

    A signal ends the waiting and leaves the jobs alone.
    """
    with StopRequest() as stop:
        states = _until_over(parts, ask, say, stop)
    if states is None:
        say("The jobs go on without this command.")
        return 128 + stop.signum
    found = verdict(parts, states)
    for line in told(found, parts, states):
        say(line)
    return found.status


def _until_over(
    parts: Sequence[Part], ask: Ask, say: Callable[[str], None], stop: StopRequest
) -> Mapping[str, JobState] | None:
    """The states once all jobs are over; None where a signal came first."""
    before: dict[str, str] = {}
    known = time.monotonic()
    width, id_width = (max(map(len, column)) for column in zip(*((part.key, part.id) for part in parts), strict=True))
    while not stop.requested:
        states = ask([part.id for part in parts])
        for part in parts:
            word = _word(states[part.id])
            if word and word != before.get(part.id):
                say(f"{time.strftime('%H:%M:%S')}  {part.key:<{width}}  {part.id:<{id_width}}  {word}")
                before[part.id] = word
        unknown = [part for part in parts if not states[part.id].state]
        if not unknown:
            known = time.monotonic()
        patient = unknown and time.monotonic() - known < FORGOTTEN_AFTER_S
        if not patient and all(queue.is_over(states[part.id]) for part in parts):
            return states
        stop.pause(POLL_EVERY_S)
    return None


def _word(state: JobState) -> str:
    """A state as it is shown."""
    where = f" on {state.nodes}" if state.nodes and state.state == "RUNNING" else ""
    why = f" ({state.reason})" if state.reason and state.state == "PENDING" else ""
    return f"{state.state.lower()}{where}{why}"


def told(found: Verdict, parts: Sequence[Part], states: Mapping[str, JobState]) -> list[str]:
    """How it went, in words."""
    if not found.status:
        return ["All jobs have ended well."]
    lines = []
    for part in found.failed:
        state = states[part.id]
        code = f", exit status {state.exit_code}" if state.exit_code not in ("", "0:0") else ""
        lines.append(f"{part.key} (job {part.id}) has failed: {state.state or 'SLURM has forgotten it'}{code}")
        links = [other for other in parts if (other.name, other.run) == (part.name, part.run)]
        if part.name != "report" or part == found.failed[0]:  # it has nothing to show where trainings fail
            lines += _cause(links)
    if found.cancelled:
        which = ", ".join(f"{part.key} (job {part.id})" for part in found.cancelled)
        lines.append(f"cancelled{', as it cannot begin without that' if found.failed else ''}: {which}")
    return lines


def _cause(links: Sequence[Part]) -> list[str]:
    """The last lines of the task that ended the job, or the first of its links that failed."""
    for part in links:
        for restart in reversed(restarts_of(part.run, part.id)):
            guilty = guilty_task(read_records(part.run, part.id, restart))
            if guilty is not None:
                return last_lines(part.logs, part.id, guilty.rank, f"{guilty}")
    return last_lines(links[0].logs, links[0].id, 0, "its log")


def guilty_task(records: Sequence[Record]) -> Record | None:
    """The task that is the cause: the first that ended by an error of its own, else one that came to no end."""
    own = [record for record in records if is_own_error(record.status)]
    silent = [record for record in records if record.status is None]
    return min(own, key=lambda record: record.ended or 0.0) if own else silent[0] if silent else None


def last_lines(logs: Path, job_id: str, task: int, title: str) -> list[str]:
    """The end of a task's log: of its stderr, or of its stdout where that is empty."""
    for ending in ("err", "out"):
        path = logs / f"{job_id}_{task}_log.{ending}"
        lines = path.read_text(errors="replace").rstrip().splitlines() if path.exists() else []
        if lines:
            return [f"  the last lines of {title}, {path}:", *(f"    {line}" for line in lines[-LAST_LINES:])]
    return [f"  it has left no log in {logs}"]
