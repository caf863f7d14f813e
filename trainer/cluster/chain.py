"""The jobs of a pipeline, what each runs and what each waits for, as data.

    shards -> stage 1 -> stage 2, beside each stage a worker that scores it, and a last job that writes the report

A run takes part with what is still to be done: a stage that has finished or runs in an earlier job gives no new job,
and what follows it waits for that job. Several runs (a sweep) that need the same are one job array, or several where
SLURM allows none so long, stage 2 element by element behind stage 1; a worker belongs to one run. Where jobs cannot
be put back into the queue a training is several jobs, its links, of which each waits for the one before. Nothing here
knows of SLURM but the names of its conditions; the last part says in which order the same chain runs without it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

Condition = Literal["after", "afterok", "afterany", "aftercorr"]
Standing = Literal["free", "running", "finished", "failed"]
Outcome = Literal["waiting", "running", "ok", "failed", "cancelled"]


@dataclass(frozen=True)
class Wait:
    """What a job waits for: another one of the chain, by its key, or one that is in the queue already, by its id.

    Attributes:
        condition: after: has begun; afterok: has ended well; afterany: has ended; aftercorr: element by element, well.
        element: of a job array; None for the whole.
    """

    condition: Condition
    key: str = ""
    id: str = ""
    element: int | None = None


@dataclass(frozen=True)
class Element:
    """What a job does in a run's name: the arguments of `python -m trainer`.

    In the job `shards` they are those of make_shards, and behind several runs, after a leading `sweep`, those of
    `python -m trainer.cluster.sweep`.
    """

    run: Path
    argv: tuple[str, ...]


@dataclass(frozen=True)
class Job:
    """A job, or a job array of several elements.

    Attributes:
        key: names it in the chain.
        name: shards, stage1, stage2, evaluate1, evaluate2 or report.
        link: of `links` jobs that train the same, one after another, which one (counted from 1).
        earlier: the keys of the links before it.
    """

    key: str
    name: str
    elements: tuple[Element, ...]
    waits: tuple[Wait, ...] = ()
    link: int = 1
    links: int = 1
    earlier: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """shards, train, evaluate or report."""
        if self.stage is None:
            return self.name
        return "train" if self.name.startswith("stage") else "evaluate"

    @property
    def stage(self) -> int | None:
        """The stage that it trains or scores."""
        return int(self.name[-1]) if self.name[-1] in "12" else None


@dataclass(frozen=True)
class Stage:
    """How far a stage of a run is.

    Attributes:
        id: of the job that trains it: the last link, where it is running.
        worker: the id of the job that scores it; empty where there is none in the queue.
    """

    standing: Standing = "free"
    id: str = ""
    worker: str = ""

    @property
    def needed(self) -> bool:
        """Whether somebody has to train it."""
        return self.standing in ("free", "failed")


@dataclass(frozen=True)
class Run:
    """A run directory that takes part.

    Attributes:
        config: the configuration that its jobs read.
        stages: those that it trains itself.
        around: the run whose stage 1 its stage 2 stands around, where that is not its own.
    """

    path: Path
    config: Path
    stages: Mapping[int, Stage] = field(default_factory=lambda: {1: Stage(), 2: Stage()})
    around: Path | None = None


@dataclass(frozen=True)
class Shards:
    """Shards that have to be made: the arguments of make_shards, or the id of the job that is at it already."""

    argv: tuple[str, ...] = ()
    id: str = ""


def pipeline(
    home: Path,
    runs: Sequence[Run],
    *,
    shards: Shards | None = None,
    links: int = 1,
    longest: int | None = None,
) -> list[Job]:
    """The chain, in an order in which each job comes after what it waits for; empty where nothing is to be done.

    Args:
        home: where shards and the report belong: the run, or the folder of a sweep.
        runs: those that take part; a run that another one stands around comes before it.
        shards: what makes them; None where they are there.
        links: jobs that a training consists of.
        longest: elements that a job array may have; None for any number.
    """
    jobs: list[Job] = []
    data: tuple[Wait, ...] = ()
    if shards is not None and any(stage.needed for run in runs for stage in run.stages.values()):
        data = (Wait("afterok", id=shards.id),) if shards.id else (Wait("afterok", "shards"),)
        if not shards.id:
            jobs.append(Job("shards", "shards", (Element(home, shards.argv),)))
    trained: dict[tuple[Path, int], Wait] = {}
    for group in _groups(runs, longest):
        for stage in (1, 2):
            jobs += _stage(group, stage, data, trained, links, {job.key for job in jobs})
    if not jobs:
        return []
    queued = sorted({i for run in runs for s in run.stages.values() for i in (s.id, s.worker) if i}, key=_number)
    waits = [Wait("afterany", id=i) for i in queued] + [Wait("afterany", job.key) for job in jobs]
    report = ("report", str(home)) if len(runs) == 1 else ("sweep", str(home), "--report")
    return [*jobs, Job("report", "report", (Element(home, report),), tuple(waits))]


def _groups(runs: Sequence[Run], longest: int | None) -> list[list[Run]]:
    """Runs that need the same and wait for the same, at most `longest` together; in the order in which they appear."""
    groups: dict[object, list[Run]] = {}
    for run in runs:
        needs = tuple((number, stage.needed, stage.id) for number, stage in sorted(run.stages.items()))
        groups.setdefault((needs, run.around), []).append(run)
    return [
        group[first : first + (longest or len(group))]
        for group in groups.values()
        for first in range(0, len(group), longest or len(group))
    ]


def _stage(
    group: Sequence[Run],
    number: int,
    data: tuple[Wait, ...],
    trained: dict[tuple[Path, int], Wait],
    links: int,
    taken: set[str],
) -> Iterator[Job]:
    """The jobs of one stage of a group: its links, or none where it needs none, and a worker for each run."""
    if number not in group[0].stages:
        return
    waits = data if number == 1 else _behind_stage1(group, trained) or data
    begins: list[Wait] = [Wait("after", id=run.stages[number].id) for run in group]
    if group[0].stages[number].needed:
        training = list(_links(group, number, waits, links, taken))
        yield from training
        many = len(group) > 1
        begins = [Wait("after", training[0].key, element=i if many else None) for i in range(len(group))]
        for i, run in enumerate(group):
            trained[run.path, number] = Wait("afterok", training[-1].key, element=i if many else None)
    elif group[0].stages[number].standing == "finished":
        return
    else:
        waits = ()
        trained.update({(run.path, number): Wait("afterok", id=run.stages[number].id) for run in group})
    for i, (run, begin) in enumerate(zip(group, begins, strict=True)):
        if not run.stages[number].worker:
            key = _free(f"evaluate{number}" + (f".{run.path.name}" if len(group) > 1 else ""), taken)
            argv = ("watch", str(run.path), "--stage", str(number), "--until-finished")
            # what cancels a stage cancels its worker too
            own = tuple(Wait("afterok", w.key, w.id, i) if w.condition == "aftercorr" else w for w in waits)
            yield Job(key, f"evaluate{number}", (Element(run.path, argv),), (*own, begin))


def _behind_stage1(group: Sequence[Run], trained: Mapping[tuple[Path, int], Wait]) -> tuple[Wait, ...]:
    """What stage 2 of a group waits for; nothing where stage 1 has finished."""
    waits = {wait: None for run in group if (wait := trained.get((run.around or run.path, 1)))}
    if len(waits) > 1:  # an array behind the array of the same runs, in the same order
        return (Wait("aftercorr", next(iter(waits)).key),)
    return tuple(waits)


def _links(group: Sequence[Run], number: int, waits: tuple[Wait, ...], links: int, taken: set[str]) -> Iterator[Job]:
    """Jobs that train the same, one after another."""
    stage = ("--stage", str(number), "--resume")
    elements = tuple(
        Element(run.path, ("train", "--config", str(run.config), "--run", str(run.path), *stage)) for run in group
    )
    first = _free(f"stage{number}", taken)
    earlier: tuple[str, ...] = ()
    for link in range(1, links + 1):
        key = first if link == 1 else _free(f"{first}.{link}", taken)
        # what cancels the first link cancels them all
        behind = tuple(Wait("afterany", before) for before in earlier[-1:])
        yield Job(key, f"stage{number}", elements, (*waits, *behind), link, links, earlier)
        earlier = (*earlier, key)


def _free(wanted: str, taken: set[str]) -> str:
    """A key that no other job has."""
    number = 1
    key = wanted
    while key in taken:
        number += 1
        key = f"{wanted}+{number}"
    taken.add(key)
    return key


def _number(job_id: str) -> tuple[int, ...]:
    return tuple(int(part) for part in job_id.split("_") if part.isdigit())


def dependency(waits: Sequence[Wait], ids: Mapping[str, str]) -> str:
    """What sbatch is told: `afterok:12,after:13_0`; a key whose id is not known yet stands as `<stage1>`."""
    conditions: dict[str, list[str]] = {}
    for wait in waits:
        job = wait.id or ids.get(wait.key, f"<{wait.key}>")
        conditions.setdefault(wait.condition, []).append(job if wait.element is None else f"{job}_{wait.element}")
    return ",".join(":".join([condition, *jobs]) for condition, jobs in conditions.items())


# Without SLURM


def one_by_one(jobs: Sequence[Job]) -> list[Job]:
    """The chain without job arrays and without links: who drives it here restarts nothing and has no queue."""
    alone: list[Job] = []
    parts: dict[str, list[str]] = {}
    for job in jobs:
        if job.link > 1:
            parts[job.key] = parts[job.earlier[0]]
            continue
        many = len(job.elements) > 1
        parts[job.key] = [f"{job.key}.{i}" if many else job.key for i in range(len(job.elements))]
        for i, (key, element) in enumerate(zip(parts[job.key], job.elements, strict=True)):
            waits = tuple(dict.fromkeys(one for wait in job.waits for one in _of_parts(wait, parts, i)))
            alone.append(replace(job, key=key, elements=(element,), waits=waits, links=1))
    return alone


def _of_parts(wait: Wait, parts: Mapping[str, Sequence[str]], own: int) -> Iterator[Wait]:
    condition: Condition = "afterok" if wait.condition == "aftercorr" else wait.condition
    element = own if wait.condition == "aftercorr" else wait.element
    for i, key in enumerate(parts.get(wait.key, ())):
        if element is None or element == i:
            yield Wait(condition, key)


def next_steps(jobs: Sequence[Job], outcomes: Mapping[str, Outcome]) -> dict[str, Literal["start", "cancel"]]:
    """What may begin now, and what can never begin, of the jobs that wait.

    Args:
        jobs: a chain `one_by_one`.
        outcomes: how far each of them is; one that is missing waits.
    """
    steps: dict[str, Literal["start", "cancel"]] = {}
    for job in jobs:
        if outcomes.get(job.key, "waiting") != "waiting":
            continue
        waits = [_met(wait.condition, outcomes.get(wait.key, "waiting")) for wait in job.waits if wait.key]
        if False in waits:
            steps[job.key] = "cancel"
        elif all(waits):
            steps[job.key] = "start"
    return steps


def _met(condition: Condition, outcome: Outcome) -> bool | None:
    """Whether a condition is met; False: it never will be, None: not yet."""
    over = outcome in ("ok", "failed", "cancelled")
    if condition == "afterok":
        return (outcome == "ok") if over else None
    return True if over or (condition == "after" and outcome == "running") else None
