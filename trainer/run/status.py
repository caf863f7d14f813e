"""How far a run is: `python -m trainer status RUN`.

Everything is read from the files of the run, on any machine that sees them and in a moment (no torch). What the files
say is gathered first; what it means is a function of that. Of jobs that were submitted for the run SLURM says more,
where its programs are installed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from trainer.errors import InputError
from trainer.run import checkpoint, heartbeat, jobs
from trainer.run.alive import Owner
from trainer.run.directory import RunDirectory, StageDirectory
from trainer.run.files import read_object
from trainer.run.jobs import Job, JobState, is_over
from trainer.run.launch import sharing

State = Literal["waiting", "running", "stale", "finished", "interrupted", "failed"]

RECENT_S = 20.0  # a beat that looks as young as this is believed, whoever's clock it is
WATCH_S = 12.0  # the counter of an older one is watched for so long, more than two beats


@dataclass(frozen=True)
class StageFacts:
    """What the files say of one part of a run: a stage, or its refit.

    Attributes:
        title: as in the log, "Stage 1" or "Stage 1 refit".
        waits_for: why it cannot start yet; empty where it could.
        heartbeat: of the stage's newest start; None where nobody has started.
        start: what that start wrote down about itself.
        lives: whether that start still runs.
        finished: the stage's finished.json.
        refit_begun: this is the part before a refit that is under way or done.
        log: the lines of metrics.jsonl.
        scores: the score files.
        checkpoint: step and time (seconds since 1970) of the newest one.
        now: seconds since 1970.
    """

    title: str
    now: float
    waits_for: str = ""
    heartbeat: Mapping[str, Any] | None = None
    start: Mapping[str, Any] = field(default_factory=dict)
    lives: bool = False
    finished: Mapping[str, Any] | None = None
    refit_begun: bool = False
    log: Sequence[Mapping[str, Any]] = ()
    scores: Sequence[Mapping[str, Any]] = ()
    checkpoint: tuple[int, float] | None = None


@dataclass(frozen=True)
class StageStatus:
    """How far one part of a run is.

    Attributes:
        why: what a state that is not simply good comes from.
        phase: what it does now where that is not the part itself, e.g. "Fold 2 of 5".
        step: of that phase; with `total`, its planned end (an early stop may come first).
        seconds_left: of that phase, at the pace of the last minutes.
        owner: the process, and the number of its start.
        world: the processes of the newest start, and how they share the work; empty for one that shares nothing.
        loss: (step, mean training loss since the line before, windows/s).
        best: (set, step, r) of the checkpoint that the validations choose so far.
        checkpoint: (step, age in seconds) of the newest one.
    """

    title: str
    state: State
    why: str = ""
    phase: str = ""
    step: int | None = None
    total: int | None = None
    seconds_left: float | None = None
    owner: tuple[Owner, int] | None = None
    world: str = ""
    loss: tuple[int, float, float] | None = None
    best: tuple[str, int, float | None] | None = None
    checkpoint: tuple[int, float] | None = None


def stage_status(facts: StageFacts) -> StageStatus:
    """What the files of a part mean."""
    state, why = _state(facts)
    trained = [line for line in facts.log if line["kind"] == "train"]
    step = trained[-1]["step"] if trained else None
    phase, total, left, owner = "", None, None, None
    beat = facts.heartbeat
    if beat is not None and state not in ("waiting", "finished"):
        owner = (Owner.read(beat), beat["start"])
        phase = beat["title"] if beat["title"] != facts.title else ""
        if beat["total"]:
            step, total = (beat["step"] if phase else max(beat["step"], step or 0)), beat["total"]
        pace = beat.get("steps_per_s")
        if state == "running" and pace and step is not None and total is not None:
            left = (total - step) / pace
    return StageStatus(
        title=facts.title,
        state=state,
        why=why,
        phase=phase,
        step=facts.finished["step"] if facts.finished else step,
        total=total,
        seconds_left=left,
        owner=owner,
        world=_world(facts.start),
        loss=(trained[-1]["step"], trained[-1]["loss"], trained[-1]["windows_per_s"]) if trained else None,
        best=_best(facts.scores),
        checkpoint=facts.checkpoint and (facts.checkpoint[0], max(0.0, facts.now - facts.checkpoint[1])),
    )


def _state(facts: StageFacts) -> tuple[State, str]:
    """A part's state, and what it comes from."""
    beat = facts.heartbeat
    if facts.finished is not None:
        return "finished", ""
    if facts.refit_begun:
        return "finished", "its refit follows"
    if beat is None:
        return "waiting", facts.waits_for or "not started"
    if "ended" in beat:
        return beat["ended"]["state"], beat["ended"]["why"]
    if facts.lives:
        return "running", ""
    return "stale", f"no sign of life of {Owner.read(beat)}"


def _world(start: Mapping[str, Any]) -> str:
    """The processes of a start: `8 of srun, ZeRO-2`; an older version did not note how they share the work."""
    world = start.get("world", 1)
    how = sharing(world, start["zero_stage"]) if "zero_stage" in start else ""
    return f"{world} of {start['launcher']}{', ' if how else ''}{how}" if world > 1 or how else ""


def _best(scores: Sequence[Mapping[str, Any]]) -> tuple[str, int, float | None] | None:
    for name in sorted({score["set"] for score in scores if score.get("validation")}):
        step = checkpoint.best_step(scores, name)
        for score in scores:
            if (score["set"], score["estimate"], score["step"]) == (name, "mean", step):
                return name, score["step"], score.get("pearson_r")
    return None


def described(status: StageStatus) -> list[str]:
    """A status as it is printed."""
    lines = [f"{status.title}: {status.state}{_place(status)}"]
    rows = [("why", status.why), ("now", status.phase)]
    if status.owner is not None:
        owner, start = status.owner
        rows.append(("process", f"{owner.pid} on {owner.host}, start {start}"))
    rows.append(("processes", status.world))
    if status.loss is not None:
        step, loss, speed = status.loss
        rows.append(("loss", f"{loss:.4f} at step {step}, {speed:.0f} windows/s"))
    if status.best is not None:
        name, step, r = status.best
        rows.append(("best r", f"{'not a number' if r is None else f'{r:.4f}'} on {name} at step {step}"))
    if status.checkpoint is not None:
        step, age = status.checkpoint
        rows.append(("checkpoint", f"step {step}, {duration(age)} ago"))
    return lines + [f"  {name:<11}{text}" for name, text in rows if text]


def _place(status: StageStatus) -> str:
    if status.step is None:
        return ""
    if status.total is None:
        return f", step {status.step}" + (" chosen" if status.state == "finished" and not status.why else "")
    left = "" if status.seconds_left is None else f", about {duration(status.seconds_left)} left"
    return f", step {status.step} of {status.total} ({status.step / status.total:.0%}){left}"


def duration(seconds: float) -> str:
    """Seconds as people say them, in at most two units."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    if minutes < 90:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"


def described_jobs(submitted: Sequence[Job], states: Mapping[str, JobState], now: float) -> list[str]:
    """The jobs of a run as they are printed: those that are not over, and the last of each name that is."""
    last = {job.name: job for job in submitted if job.array is None}
    shown = [job for job in submitted if job.array is not None or job == last[job.name] or not is_over(states[job.id])]
    if not shown:
        return []
    whys = {states[job.id].reason for job in shown if not states[job.id].state}
    if len(whys) == 1 and not any(states[job.id].state for job in shown):
        rows = [[job.name, job.id, f"submitted {duration(max(0.0, now - job.time))} ago"] for job in shown]
        return [f"Jobs: states unknown ({whys.pop()})", *_aligned(rows)]
    return ["Jobs", *_aligned([_row(job, states[job.id]) for job in shown])]


def _row(job: Job, state: JobState) -> list[str]:
    """Name, id and state of a job, and of where it runs or why it does not what is known."""
    left = f"{state.left} left" if state.state == "RUNNING" and state.left else ""
    failed = state.exit_code if state.exit_code not in ("", "0:0") else ""
    return [
        job.name,
        job.id,
        state.state or "unknown",
        ", ".join(filter(None, (state.nodes, left, state.reason, failed))),
    ]


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        ("  " + "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True))).rstrip() for row in rows
    ]


def show(run: RunDirectory) -> Iterator[str]:
    """The lines about all parts of a run, and about its jobs.

    Raises:
        InputError: there is no such run.
    """
    if not run.path.is_dir():
        raise InputError(run.path, "no such run directory")
    submitted = jobs.read(run.path)
    if not submitted and not any(run.stage(number).has_started() for number in (1, 2)):
        raise InputError(run.path, "holds no training", expected="a run directory with stage1/")
    for number in (1, 2):
        for facts in read_facts(run, number):
            yield from described(stage_status(facts))
    if submitted:
        yield from described_jobs(submitted, jobs.states([job.id for job in submitted]), time.time())


def read_facts(run: RunDirectory, number: int) -> list[StageFacts]:
    """What the files say of a stage and, where it has begun, of its refit."""
    stage = run.stage(number)
    beat = heartbeat.read_heartbeat(stage.path)
    start = stage.path / "starts" / f"{beat['start'] if beat else 0}.json"
    finished = stage.finished()
    lives = finished is None and beat is not None and _lives(stage.path, beat)
    waits = "stage 1 is not finished" if number == 2 and run.stage(1).finished() is None else ""
    refits = stage.refit.path.exists()

    def part(title: str, directory: StageDirectory, refit_begun: bool) -> StageFacts:
        return StageFacts(
            title=title,
            now=time.time(),
            waits_for=waits,
            heartbeat=beat,
            start=read_object(start) if start.exists() else {},
            lives=lives,
            finished=finished,
            refit_begun=refit_begun,
            log=directory.read_metrics(),
            scores=list(directory.read_scores()),
            checkpoint=_newest_checkpoint(directory.checkpoints),
        )

    own = part(f"Stage {number}", stage, refits)
    return [own, part(f"Stage {number} refit", stage.refit, False)] if refits else [own]


def _lives(folder: Path, beat: Mapping[str, Any]) -> bool:
    """Whether a start runs, watching its counter where nothing else can tell."""
    lives = Owner.read(beat).lives()
    if lives is None and abs(time.time() - beat["time"]) < RECENT_S:
        return True
    return heartbeat.holder(folder, patience_s=WATCH_S) is not None if lives is None else lives


def _newest_checkpoint(checkpoints: Path) -> tuple[int, float] | None:
    for step in reversed(checkpoint.steps(checkpoints)):
        try:
            return step, checkpoint.folder_of(checkpoints, step).stat().st_mtime
        except FileNotFoundError:  # deleted since
            continue
    return None
