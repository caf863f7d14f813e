"""What the batch script of a job does before and after its tasks: begin it or not, and see how it ended.

    python -m trainer.cluster.ending begin --run RUN --name stage1 ...     prints lines that the shell evaluates
    python -m trainer.cluster.ending end --status N --run RUN ...          requeues the job, or says why it does not

How a start of a job ended follows from the records of its tasks (`verdict`), and what is to be done from that
(`step_after`): one that a signal interrupted goes on, as often as it happens; one that was killed is tried again at
most `max_requeues` times; one that failed by an error of its own is never tried again. No torch: this runs in a moment.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trainer.cluster.meeting import meet
from trainer.cluster.records import Place, Record, read_end, read_records, restarts_of, write_end
from trainer.errors import InputError, exit_on_input_error

Verdict = Literal["done", "interrupted", "failed", "killed"]

EX_LOST = os.EX_TEMPFAIL
"""The status of a task that lost the others: some other one is the cause."""
WISHES = tuple(128 + int(number) for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM))
"""The statuses of a task that a signal of SLURM's asked to end, and that did so at a step boundary."""
ASK_SECONDS = 60
IDLE_STARTS = 5
"""So many starts in a row may be asked to end before they have trained anything; their time may be too short."""


def verdict(records: Sequence[Record], status: int | None = None) -> Verdict:
    """How a start of a job ended.

    Args:
        records: of its tasks.
        status: of srun; tells something only where no task came to write a record. None where it is not known.
    """
    if not records:
        if status == 0:
            return "done"
        return "failed" if status is not None and status < 128 else "killed"
    ends = [record.status for record in records]
    if any(is_own_error(end) for end in ends):
        return "failed"
    if None in ends or len(records) < records[0].tasks:
        return "killed"
    if all(end == 0 for end in ends):
        return "done"
    # a task that lost the others did so because those were interrupted
    interrupted = any(end in WISHES for end in ends) and all(end in (0, EX_LOST, *WISHES) for end in ends)
    return "interrupted" if interrupted else "killed"


def is_own_error(status: int | None) -> bool:
    """Whether a task ended by an error of its own: Python's 1, 2 for bad input, 3 of a worker, ..."""
    return status is not None and status not in (0, EX_LOST) and status < 128


@dataclass(frozen=True)
class Start:
    """One earlier start of a job, of this one or of an earlier link."""

    job: str
    restart: int
    verdict: Verdict
    status: int | None = None
    idle: bool = False


@dataclass(frozen=True)
class Rules:
    """How a job may go on: how often after a kill, and whether by SLURM's requeue or by the next of several links."""

    name: str
    max_requeues: int = 3
    requeue: bool = True
    link: int = 1
    links: int = 1

    @property
    def has_next(self) -> bool:
        """Whether another link follows."""
        return self.link < self.links

    def __str__(self) -> str:
        return f"{self.name}, link {self.link} of {self.links}" if self.links > 1 else self.name


def why_not_to_begin(rules: Rules, starts: Sequence[Start]) -> str | None:
    """Why a job does not begin, from how its earlier starts ended; None where it does."""
    for start in starts:
        if start.verdict == "failed":
            return (
                f"job {start.job} ended by an error of its own{_with(start.status)} and is not tried again; its logs "
                f"say which. Mend it and submit again: what is trained is kept"
            )
    killed = _killed(starts)
    if killed > rules.max_requeues:
        return _killed_too_often(rules, killed)
    return None


def _killed(starts: Sequence[Start]) -> int:
    return sum(start.verdict == "killed" for start in starts)


def _killed_too_often(rules: Rules, killed: int) -> str:
    times = "once" if killed == 1 else f"{killed} times"
    return (
        f"killed {times}, which is more often than max_requeues={rules.max_requeues} allows. The logs may say why "
        f"(memory? time? a broken node?). Submit again to go on from the newest checkpoint"
    )


def _with(status: int | None) -> str:
    return "" if status is None else f" (status {status})"


@dataclass(frozen=True)
class Step:
    """What a batch script does at its end: ask for a requeue, or leave with `status`; and what it says."""

    requeue: bool
    status: int
    says: str = ""


def step_after(rules: Rules, ended: Verdict, status: int, killed: int, idle: int = 0) -> Step:
    """What follows from how a start of a job ended.

    Args:
        rules: of the job.
        ended: how.
        status: of the task that failed, or of srun.
        killed: how often the job was killed so far, this time included.
        idle: how many starts in a row, with this one, were interrupted before anything was trained.
    """
    if ended == "done":
        return Step(False, 0)
    if ended == "failed":
        return Step(False, status or 1, "failed, and is not tried again. Mend it and submit again: it continues")
    if ended == "killed" and killed > rules.max_requeues:
        return Step(False, 1, _killed_too_often(rules, killed))
    if idle >= IDLE_STARTS:
        return Step(
            False, 1, f"asked to end {idle} times in a row before anything was trained: its --time may be too short"
        )
    how = "interrupted" if ended == "interrupted" else f"killed ({killed} of at most {rules.max_requeues} times)"
    if rules.requeue:
        return Step(True, EX_LOST, how)
    return step_without_requeue(rules, f"{how}, and may not be requeued")


def step_without_requeue(rules: Rules, why: str) -> Step:
    """What follows where SLURM does not start the job again: the next link goes on, or a person does."""
    if rules.has_next:
        return Step(False, EX_LOST, f"{why}; link {rules.link + 1} of {rules.links} goes on")
    return Step(False, EX_LOST, f"{why}. Submit again to go on from the newest checkpoint")


@exit_on_input_error
def main(argv: Sequence[str] | None = None) -> int:
    """Run one of the two; returns the exit status of the batch script."""
    # a requeue or a cancellation signals the whole batch script; this is its last word, and quick
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    options = _parser().parse_args(argv)
    place = Place.of_job(os.environ)
    if place is None:
        raise InputError("SLURM_JOB_ID", "is not set", fix="This is called by the batch scripts of slurm/.")
    rules = Rules(options.name, options.max_requeues, options.requeue == "yes", options.link, options.links)
    starts = _starts(options.run, place, options.earlier)
    if options.command == "begin":
        return _begin(options.run, place, rules, starts, options.earlier)
    return _end(options.run, place, rules, starts, options.status)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m trainer.cluster.ending", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("begin", "end"):
        command = commands.add_parser(name)
        command.add_argument("--run", type=Path, required=True, help="run directory")
        command.add_argument("--name", required=True, help="stage1, stage2, evaluate1, ...")
        command.add_argument("--max-requeues", type=int, default=3, help="how often a killed job is tried again")
        command.add_argument("--requeue", choices=["yes", "no"], default="yes", help="whether SLURM may requeue it")
        command.add_argument("--link", type=int, default=1, help="which of several jobs that follow each other")
        command.add_argument("--links", type=int, default=1, help="how many those are")
        command.add_argument("--earlier", nargs="*", default=[], help="the ids of the links before this one")
    command.add_argument("--status", type=int, required=True, help="of srun")
    return parser


def _starts(run: Path, place: Place, earlier: Sequence[str]) -> list[Start]:
    """The starts of earlier links, and those of this job before the present one."""
    starts = [_start(run, job, restart) for job in earlier for restart in restarts_of(run, job)]
    return starts + [_start(run, place.job, restart) for restart in range(place.restart)]


def _start(run: Path, job: str, restart: int) -> Start:
    """An earlier start: what its batch script said of it, else what its tasks did."""
    said = read_end(run, job, restart)
    if said is not None:
        return Start(job, restart, said["verdict"], said["status"], said["idle"])
    records = read_records(run, job, restart)
    own = [record.status for record in records if is_own_error(record.status)]
    return Start(job, restart, verdict(records), own[0] if own else None, _is_idle(records))


def _is_idle(records: Sequence[Record]) -> bool:
    """Whether a signal came before anything was trained, for all tasks that it came to."""
    wished = [record.idle for record in records if record.status in WISHES]
    return bool(wished) and all(wished)


def _idle_in_a_row(starts: Sequence[Start]) -> int:
    """How many of the last starts were idle."""
    return next((n for n, start in enumerate(reversed(starts)) if not start.idle), len(starts))


def _begin(run: Path, place: Place, rules: Rules, starts: Sequence[Start], earlier: Sequence[str]) -> int:
    """Print what the shell evaluates: where the ranks meet, or an end."""
    (run / "slurm").mkdir(parents=True, exist_ok=True)
    nothing_left = _why_nothing_is_left(run, rules, starts, earlier)
    if nothing_left:
        _say(rules, place, nothing_left)
        print("exit 0")
        return 0
    refused = why_not_to_begin(rules, starts)
    if refused:
        _say(rules, place, f"error: {refused}.")
        print("exit 1")
        return 0
    meeting = meet(run, place, os.environ)
    if meeting is not None:
        print(f"export MASTER_ADDR={shlex.quote(meeting.address)} MASTER_PORT={meeting.port}")
    if earlier:
        print(f"export FMRI_FLOW_EARLIER={shlex.quote(' '.join(earlier))}")
    return 0


def _why_nothing_is_left(run: Path, rules: Rules, starts: Sequence[Start], earlier: Sequence[str]) -> str | None:
    """Why there is nothing to do, where there is nothing."""
    finished = run / rules.name / "finished.json"
    if rules.name.startswith("stage") and finished.exists():
        return f"nothing to do: {finished} is there."
    done = next((start.job for start in starts if start.job in earlier and start.verdict == "done"), None)
    return f"nothing to do: job {done} has done it." if done else None


def _end(run: Path, place: Place, rules: Rules, starts: Sequence[Start], status: int) -> int:
    """Say how this start ended, and requeue the job where that is due; returns the status of the batch script."""
    records = read_records(run, place.job, place.restart)
    ended = verdict(records, status)
    failed = next((record for record in records if is_own_error(record.status)), None)
    if failed is not None and failed.status is not None:
        status = failed.status
    # a worker may well wait for long, and a report has nothing to go on from
    idle = ended == "interrupted" and rules.name.startswith("stage") and _is_idle(records)
    write_end(run, place.job, place.restart, verdict=ended, status=status, idle=idle)
    starts = [*starts, Start(place.job, place.restart, ended, status, idle)]
    for record in records:
        if record.status != 0 and ended != "interrupted":
            _say(rules, place, _told(record))
    step = step_after(rules, ended, status, _killed(starts), _idle_in_a_row(starts))
    if step.requeue:
        step = _requeue(rules, step)
    if step.says:
        _say(rules, place, f"{step.says}." if step.requeue else f"error: {step.says}.")
    return step.status


def _told(record: Record) -> str:
    """How one task ended, in words."""
    if record.status is None:
        return f"{record} came to no end of its own: it or its node was killed, or it killed itself."
    if record.status == EX_LOST:
        return f"{record} lost the others: {record.why}"
    return f"{record} ended with status {record.status}: {record.why or 'see its log'}"


def _requeue(rules: Rules, step: Step) -> Step:
    """Ask SLURM to start this job again, unless somebody cancels it; returns what to do and say now."""
    job = os.environ["SLURM_JOB_ID"]
    try:
        state = _scontrol("show", "job", "-o", job)
        if is_cancelled(state.stdout):
            return Step(False, step.status, f"{step.says}; SLURM is ending it (cancelled?), so it is not requeued")
        asked = _scontrol("requeue", job)
    except FileNotFoundError:
        return step_without_requeue(rules, f"{step.says}, and scontrol is missing on this node")
    except subprocess.TimeoutExpired:
        return step_without_requeue(rules, f"{step.says}, and scontrol has not answered for {ASK_SECONDS} s")
    if asked.returncode:
        refused = " ".join(asked.stderr.split())
        return step_without_requeue(rules, f"{step.says}, and SLURM does not requeue it ({refused})")
    return Step(True, step.status, f"{step.says}; requeued")


def is_cancelled(told: str) -> bool:
    """Whether SLURM is ending a job for good, from what `scontrol show job -o` says while its batch script still runs.

    A job that is cancelled is then COMPLETING, as is one that has run into its time limit, which goes on.
    """
    found = dict(re.findall(r"\b(JobState|Reason)=(\w+)", told))
    state, reason = found.get("JobState", ""), found.get("Reason", "")
    return state == "CANCELLED" or (state == "COMPLETING" and reason != "TimeLimit")


def _scontrol(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["scontrol", *arguments], capture_output=True, text=True, timeout=ASK_SECONDS)


def _say(rules: Rules, place: Place, text: str) -> None:
    """One line in the log of the batch script; stdout of `begin` is for the shell."""
    print(f"{rules} (job {place.job}, start {place.restart}): {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
