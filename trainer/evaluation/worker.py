"""Score checkpoints of a run as they appear, together with other workers: `python -m trainer watch`.

The unit that workers share is one checkpoint on one set. What remains is a function of what the folders list (see
`todo`); a claim says who does it. A worker may itself be several processes: the main one looks, claims and writes, all
score together, and the scores are those of one process.
"""

from __future__ import annotations

import errno
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from trainer.data.study import Study
from trainer.evaluation import lifetime
from trainer.evaluation.held import Settling, content_of, hold, let_go, let_go_of, score_if_whole
from trainer.evaluation.lifetime import Life, StageState, first_config, state_of
from trainer.evaluation.todo import Part, Remaining, Unit, parts_of, remaining
from trainer.progress import listening, say
from trainer.run import checkpoint
from trainer.run.claims import Claim, ClaimLost
from trainer.run.directory import RunDirectory, StageDirectory
from trainer.run.processes import StopRequest, make_processes
from trainer.run.watchdog import Watchdog
from trainer.scoring import kept
from trainer.scoring.known import open_study, warn
from trainer.scoring.shares import Ranks, in_order
from trainer.stored import load_stored

T = TypeVar("T")
STAGES = (1, 2)


def watch(
    run: RunDirectory, sets: Sequence[str] | None, *, until_finished: bool, stages: Sequence[int] = STAGES
) -> int:
    """Score the checkpoints of a run as they appear, on sets of the configuration that were not trained on.

    Args:
        run: its directory, which need not be there yet.
        sets: names; all without them.
        until_finished: end with the training, rather than watch until a signal.
        stages: those to look at; of one alone, the end of that stage is the end of the training.

    Returns: the exit status: `lifetime.FINISHED`, `lifetime.GONE`, or 128 + the signal that asked for an end.

    Raises:
        InputError: no training begins there, there is no such set, or checkpoints do not fit the shards.
    """
    with StopRequest() as stop:
        config = first_config(run, stages, stop)
        if config is None:
            return 128 + stop.signum
        # what scores are computed with: nothing of a training's precision or accumulation
        processes = make_processes(precision="no", deterministic=config.deterministic, timeout_s=config.timeout_s)
        with Watchdog(processes, config.timeout_s) as watchdog, listening(watchdog.alive):
            worker = Worker(
                run, sets, processes, stop, until_finished=until_finished, alive=watchdog.alive, stages=stages
            )
            return worker.run_to_its_end()


@dataclass(frozen=True)
class Task:
    """What the main process gives all processes to do.

    Attributes:
        part: the number of the unit's part.
        checkpoints: where its checkpoint is held.
        content: what the checkpoint's own folder held before.
        config: tells the configuration of the stage from those before and after it.
    """

    part: int
    unit: Unit
    checkpoints: Path
    content: object
    config: object


@dataclass(frozen=True)
class Guarded:
    """The ranks of a worker whose main process acts only while `guard` does not raise."""

    ranks: Ranks
    guard: Callable[[], None]

    @property
    def rank(self) -> int:
        """The rank's own."""
        return self.ranks.rank

    @property
    def world(self) -> int:
        """The ranks' own."""
        return self.ranks.world

    @property
    def is_main(self) -> bool:
        """The rank's own."""
        return self.ranks.is_main

    @property
    def device(self) -> torch.device:
        """The rank's own."""
        return self.ranks.device

    def gather_objects(self, value: T) -> list[T]:
        """As the ranks do."""
        return self.ranks.gather_objects(value)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """As the ranks do."""
        return self.ranks.sum(values)

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """As the ranks do."""
        return self.ranks.share(items)

    def first(self, action: Callable[[], T]) -> T:
        """Let the main process act, if it still may. Raises, on all, what the guard raises."""

        def act() -> T:
            self.guard()
            return action()

        return self.ranks.first(act)


class Worker:
    """One worker: on its main process it looks and claims, on all it scores."""

    def __init__(
        self,
        run: RunDirectory,
        sets: Sequence[str] | None,
        processes: Ranks,
        stop: StopRequest,
        *,
        until_finished: bool,
        alive: Callable[[], None] = lambda: None,
        stages: Sequence[int] = STAGES,
    ) -> None:
        self._stages = {number: run.stage(number) for number in stages}
        self._sets, self._processes, self._stop = sets, processes, stop
        self._until_finished, self._alive = until_finished, alive
        self._parts = parts_of(run, stages)
        self._life = Life(list(self._stages.values()))
        self._settling = Settling()
        self._studies: dict[int, tuple[object, Study]] = {}
        self._digests: dict[int, dict[str, dict[str, str]]] = {}
        self._warned: set[str] = set()
        self._claim: Claim | None = None

    def run_to_its_end(self) -> int:
        """Work until the training has ended, if asked to, or a signal comes; returns the exit status."""
        while True:
            signum = max(self._processes.gather_objects(self._stop.signum))
            if signum:
                return 128 + signum
            self._alive()
            turn = self._processes.first(self.turn)
            if isinstance(turn, int):
                return turn
            if turn is None:
                self._stop.pause(lifetime.POLL_EVERY_S)
            else:
                self.do(turn)

    def turn(self) -> Task | int | None:
        """On the main process, what to do now: a task, which is claimed, an exit status, or nothing for a while."""
        self._life.look()
        # before the folders are listed: of a training that finishes in between, the last checkpoint is seen later
        stages = {number: state_of(stage) for number, stage in self._stages.items()}
        found = [self._remaining(part, stages[part.number]) for part in self._parts]
        free = [(number, unit) for number, rest in enumerate(found) for unit in rest.free]
        claimed = [(number, unit) for number, rest in enumerate(found) for unit in rest.claimed]
        for number, unit in free + claimed:
            task = self._try(number, unit)
            if task is not None:
                return task
        if any(found):
            return None
        for part, rest in zip(self._parts, found, strict=True):
            self._tidy(part, rest.leftover)
        return self._life.ending(list(stages.values())) if self._until_finished else None

    def do(self, task: Task) -> None:
        """Score, on all processes; what keeps one of them from it keeps all."""
        part, unit = self._parts[task.part], task.unit
        try:
            with listening(self._look_up):
                why = self._score(part, task)
            if why is not None:
                self._processes.first(partial(self._note_not_whole, part, task, why))
        except ClaimLost as lost:
            self._say(f"{part}: step {unit.step} on {unit.set_name} is left to another worker ({lost})")
        except InterruptedError as interrupted:
            self._say(f"{part}: step {unit.step} on {unit.set_name} is given up ({interrupted.strerror})")
        finally:
            if self._claim is not None:
                let_go(task.checkpoints)
                self._claim.release()
                self._claim = None

    def _remaining(self, part: Part, stage: StageState) -> Remaining:
        """What remains to be scored of a part."""
        listed = part.look(self._settling.steps(part.directory.checkpoints))
        if not listed.steps or part.config is None:
            return Remaining()
        study = self._study(part, part.config)
        data = self._digests[part.number]
        if data != part.data:
            part.data = data
            listed = part.look(listed.unsettled)
        trains = not part.refit and not stage.finished and self._life.may_live
        sets = tuple(sets_of(study, self._sets, refit=part.refit))
        return remaining(listed, sets, part.estimates, study.config.val_set_name if trains else None)

    def _study(self, part: Part, config: object) -> Study:
        """What a part was trained on, opened once for each configuration and each building of the shards."""
        known = self._studies.get(part.number)
        if known is None or known[0] != config or known[1].shards.are_replaced():
            study = open_study(part.stage, load_stored(part.stage.config))
            known = self._studies[part.number] = (config, study)
            self._digests[part.number] = {name: study.digest(name) for name in study.spans}
            if self._processes.is_main:
                warn(line for line in study.warnings if line not in self._warned)
            self._warned.update(study.warnings)
        return known[1]

    def _try(self, number: int, unit: Unit) -> Task | None:
        """Claim a unit and hold its checkpoint; None where another has scored or claimed it, or it is gone."""
        part = self._parts[number]
        claim = None if part.is_done(unit) else part.claims.take(str(unit))
        if claim is None:
            return None
        held, content = None, None
        try:
            folder = checkpoint.folder_of(part.directory.checkpoints, unit.step)
            content = content_of(folder)
            if not part.is_done(unit):  # by who had the claim just before
                held = hold(folder, str(unit))
                if held is None:
                    say(f"{part}: step {unit.step} was deleted before it was scored on {unit.set_name}")
        finally:
            if held is None:
                claim.release()
        if held is None:
            return None
        self._claim = claim
        return Task(number, unit, held, content, part.config)

    def _score(self, part: Part, task: Task) -> str | None:
        """Score a task; what is wrong with its checkpoint, where it is not whole."""

        def open_study() -> list[None]:
            self._study(part, task.config)
            return []

        in_order(self._processes, open_study)
        directory = StageDirectory(part.directory.path)
        directory.checkpoints = task.checkpoints
        study, ranks = self._study(part, task.config), Guarded(self._processes, self._guard)
        return score_if_whole(directory, part.number, task.unit.step, study, [task.unit.set_name], ranks)

    def _look_up(self) -> None:
        """Between two runs: end where there is a wish to stop, or another has the work. Errors reach all processes."""
        if self._stop.requested:
            raise InterruptedError(errno.EINTR, signal.Signals(self._stop.signum).name)
        if self._claim is not None and self._claim.lost:
            self._claim.check()

    def _guard(self) -> None:
        if self._claim is not None:
            self._claim.check()

    def _note_not_whole(self, part: Part, task: Task, why: str) -> None:
        """A checkpoint could not be read: it is still being copied, or damaged."""
        step = task.unit.step
        if self._settling.is_damaged(checkpoint.folder_of(part.directory.checkpoints, step), task.content):
            part.record_damaged(step, why)
            say(f"{part}: step {step} is damaged, and left out: {why}")

    def _tidy(self, part: Part, leftover: Sequence[Unit]) -> None:
        """Remove what dead workers left of what is scored or deleted: claims, and what they kept of the scores."""
        folder = part.directory.scores / kept.FOLDER
        for unit in {*leftover, *(unit for unit in map(Unit.read, kept.units(folder)) if self._is_over(part, unit))}:
            claim = part.claims.take(str(unit))
            if claim is not None:
                with claim:
                    let_go_of(part.directory.checkpoints, str(unit))
                    if self._is_over(part, unit):
                        kept.remove(folder, str(unit))

    @staticmethod
    def _is_over(part: Part, unit: Unit) -> bool:
        """Whether a unit is scored, or its checkpoint gone."""
        return part.is_done(unit) or not checkpoint.folder_of(part.directory.checkpoints, unit.step).exists()

    def _say(self, line: str) -> None:
        if self._processes.is_main:
            say(line)


def sets_of(study: Study, names: Sequence[str] | None, *, refit: bool) -> list[str]:
    """The sets to score of a part: all that it was not trained on, or those of `names` that a refit was not trained on.

    Raises:
        InputError: the run has no set of such a name, or no run of it has BOLD.
    """
    apart = study.scored_sets(refit=refit)
    if not names:
        return apart
    for name in names:
        study.check_scorable(name)
    return [name for name in names if name in apart or not refit]
