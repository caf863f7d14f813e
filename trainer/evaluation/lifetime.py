"""When a worker begins, and when it ends: what follows from the signs of life of a training."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from trainer.config import Config
from trainer.errors import InputError
from trainer.run import heartbeat
from trainer.run.alive import CounterWatch
from trainer.run.directory import RunDirectory, StageDirectory
from trainer.run.signals import StopRequest
from trainer.stored import load_stored

POLL_EVERY_S = 2.0
LOOK_EVERY_S = 5.0
"""How often the training is looked for: a heartbeat is written that often."""
STALE_AFTER_S = 30.0
"""How long there may be no sign of life of a training that has lived, until it is gone."""
BEGIN_WITHIN_S = 120.0
"""How long a training, or the next stage of one, may take to begin: it may have been started beside the worker."""

FINISHED, GONE = 0, 3
"""Exit statuses: all is trained and scored; the training is gone, and what it left is scored."""


def first_config(run: RunDirectory, numbers: Sequence[int], stop: StopRequest) -> Config | None:
    """The configuration of the first of some stages that has one, waited for; None where a signal came first."""
    deadline = time.monotonic() + BEGIN_WITHIN_S
    where = run.path if len(numbers) > 1 else run.stage(numbers[0]).path
    for path in (run.path, *run.path.parents):
        if path.exists() and not path.is_dir():
            raise InputError(path, "is no folder", expected="a run directory, or the place of one to come")
    told = False
    while not stop.requested:
        for number in numbers:
            if run.stage(number).config.exists():
                return load_stored(run.stage(number).config)
        if time.monotonic() >= deadline:
            fix = "Start the training first, or at the same time."
            raise InputError(where, f"no training has begun there within {BEGIN_WITHIN_S:g} s", fix=fix)
        if not told:
            print(f"{where}: waiting up to {BEGIN_WITHIN_S:g} s for a training to begin", file=sys.stderr)
            told = True
        stop.pause(POLL_EVERY_S)
    return None


@dataclass(frozen=True)
class StageState:
    """What decides about the end of a worker: whether a stage has started, and whether it has finished."""

    started: bool
    finished: bool


def ending(stages: Sequence[StageState], still_s: float, *, has_lived: bool) -> int | None:
    """The exit status with which a worker that has scored everything ends; None while more may come.

    Args:
        stages: all that the worker looks at.
        still_s: for how long there has been no sign of life of a training.
        has_lived: whether there has been one since the worker began.
    """
    if all(stage.finished for stage in stages):
        return FINISHED
    unfinished = any(stage.started and not stage.finished for stage in stages)
    # between two stages, or before a restart of a dead one, somebody may be about to begin
    patience = STALE_AFTER_S if unfinished and has_lived else BEGIN_WITHIN_S
    if still_s < patience:
        return None
    return GONE if unfinished or not any(stage.started for stage in stages) else FINISHED


class Life:
    """Signs of life of the training of some stages, looked for every few seconds."""

    def __init__(self, stages: Sequence[StageDirectory]) -> None:
        self._stages = stages
        self._watch = CounterWatch(STALE_AFTER_S)
        self._looked: float | None = None
        self._still_s = 0.0

    @property
    def may_live(self) -> bool:
        """Whether there was a sign of life a short while ago, or has been no time for one."""
        return self._still_s < STALE_AFTER_S

    def ending(self, stages: Sequence[StageState]) -> int | None:
        """The exit status of a worker that has scored everything, from what the stages are now."""
        return ending(stages, self._still_s, has_lived=self._watch.advanced)

    def look(self) -> None:
        """Look, if it is time to."""
        now = time.monotonic()
        if self._looked is None or now - self._looked >= LOOK_EVERY_S:
            self._looked = now
            self._still_s = self._watch.still_s([self._sign(stage) for stage in self._stages], now)

    @staticmethod
    def _sign(stage: StageDirectory) -> object:
        try:
            return heartbeat.sign_of_life(stage.path)
        except InputError:  # a stage that is being deleted
            return None


def state_of(stage: StageDirectory) -> StageState:
    """Whether a stage has started and finished."""
    return StageState(stage.has_started(), (stage.path / "finished.json").exists())
