"""What of a run remains to be scored: a function of what its folders list.

A piece of work is one checkpoint on one set. It is done when the score files of all its estimates say `"full": true`
and were taken on what the set holds now; those that the training wrote itself, with r alone, are scored again and added
to, and those of other data are scored again.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from trainer.run import checkpoint
from trainer.run.claims import Claims
from trainer.run.directory import RunDirectory
from trainer.run.files import write_json
from trainer.scoring.records import on_other_data
from trainer.scoring.score import ESTIMATES

_SCORE = re.compile(rf"step_(\d{{8}})-(\w+)-({'|'.join(ESTIMATES)})\.json")
_DAMAGED = re.compile(r"step_(\d{8})-damaged\.json")
_CLAIM = re.compile(r"step_(\d{8})-(\w+)")


class Unit(NamedTuple):
    """One checkpoint on one set: what workers share."""

    step: int
    set_name: str

    def __str__(self) -> str:
        return f"step_{self.step:08d}-{self.set_name}"

    @classmethod
    def read(cls, name: str) -> Unit:
        """The unit of a name that `str` gave."""
        step, set_name = name.removeprefix("step_").split("-")
        return cls(int(step), set_name)


@dataclass(frozen=True)
class Listed:
    """What the folders of a part of a run show at one moment.

    Attributes:
        steps: the checkpoints.
        scored: (unit, estimate) of every score file, and `full` of those that hold all there is to score.
        claimed: units that some worker has claimed, dead or alive.
        damaged: steps whose checkpoint was found damaged.
        unsettled: steps whose checkpoint is not whole, but may be so soon.
    """

    steps: frozenset[int] = frozenset()
    scored: frozenset[tuple[Unit, str]] = frozenset()
    full: frozenset[tuple[Unit, str]] = frozenset()
    claimed: frozenset[Unit] = frozenset()
    damaged: frozenset[int] = frozenset()
    unsettled: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Remaining:
    """What remains to be scored, oldest checkpoint first, since the training deletes the oldest first.

    Attributes:
        free: nobody has claimed it.
        claimed: somebody has, who may be dead.
        later: it cannot be scored yet.
        leftover: what is claimed, and does not remain to be scored.
    """

    free: tuple[Unit, ...] = ()
    claimed: tuple[Unit, ...] = ()
    later: tuple[Unit, ...] = ()
    leftover: tuple[Unit, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.free or self.claimed or self.later)


@lru_cache(maxsize=8)  # most polls ask again what the last one did
def remaining(listed: Listed, sets: tuple[str, ...], estimates: tuple[str, ...], awaited: str | None) -> Remaining:
    """What remains to be scored of a part of a run.

    Args:
        listed: what its folders show.
        sets: the sets to score; of one checkpoint, in this order.
        estimates: those that a full score has.
        awaited: the set that the training itself will validate its newest checkpoint on, if it still will. It chooses
            by what it writes then, and must not find that a worker was faster.
    """
    free: list[Unit] = []
    claimed: list[Unit] = []
    later: list[Unit] = []
    newest = max(listed.steps, default=None)
    for unit in (Unit(step, name) for step in sorted(listed.steps - listed.damaged) for name in sets):
        if all((unit, estimate) in listed.full for estimate in estimates):
            continue
        validates = unit == (newest, awaited) and (unit, "mean") not in listed.scored
        if validates or unit.step in listed.unsettled:
            later.append(unit)
        else:
            (claimed if unit in listed.claimed else free).append(unit)
    leftover = sorted(listed.claimed.difference(free, claimed, later))
    return Remaining(tuple(free), tuple(claimed), tuple(later), tuple(leftover))


class Part:
    """A stage of a run, or its refit, as workers see it; `config` tells apart the configurations that it had.

    A look lists three folders and remembers which score files were full, so that nothing is read twice; what is
    remembered is forgotten as soon as checkpoints come or go, or the stage starts or finishes, since a training may
    write a score of its own over a full one.
    """

    def __init__(self, run: RunDirectory, number: int, *, refit: bool) -> None:
        self.number, self.refit = number, refit
        self.stage = run.stage(number)
        self.directory = self.stage.refit if refit else self.stage
        self.claims = Claims(self.directory.claims)
        self.estimates = ESTIMATES[:1] if number == 1 else ESTIMATES
        self.config: object = None
        self.data: Mapping[str, Mapping[str, str]] = {}
        """Set -> the digest of what it holds now, as far as it is known."""
        self._finished = self.stage.path / "finished.json"
        self._files: list[str] | None = None
        self._state: object = None
        self._read: dict[tuple[Unit, str], bool] = {}
        self._listed = Listed()

    def __str__(self) -> str:
        return f"{self.stage.path.name}{'/refit' if self.refit else ''}"

    def look(self, unsettled: frozenset[int]) -> Listed:
        """What the folders show now; costs their listing, and a read of each new score file."""
        folders = _names(self.directory.checkpoints)
        if not folders:
            return Listed()
        files = _names(self.directory.scores)
        self.config = stamp(self.stage.config)
        state = (folders, self.config, stamp(self._finished), dict(self.data))
        if state != self._state:
            self._read.clear()
        if (state, files) != (self._state, self._files):
            self._listed = self._parse(files)
            self._state, self._files = state, files
        claims = (_CLAIM.fullmatch(name) for name in self.claims.names())
        claimed = frozenset(Unit(int(match[1]), match[2]) for match in claims if match)
        return replace(self._listed, claimed=claimed, unsettled=unsettled)

    def is_done(self, unit: Unit) -> bool:
        """Whether a unit is scored in full, read now."""
        for estimate in self.estimates:
            self._read[unit, estimate] = self._holds_all(unit, estimate)
        self._files = None  # the next look takes the news in
        return all(self._read[unit, estimate] for estimate in self.estimates)

    def record_damaged(self, step: int, why: str) -> None:
        """Write down that a checkpoint is damaged: no worker tries it again."""
        write_json(self._damaged(step), {"step": step, "why": why})

    def forget_damaged(self, step: int) -> None:
        """A checkpoint that was damaged is whole: it was trained again."""
        self._damaged(step).unlink(missing_ok=True)

    def _parse(self, files: Sequence[str]) -> Listed:
        """The listing of the score files, with what those say that have not been read."""
        matches = [match for match in map(_SCORE.fullmatch, files) if match]
        scored = frozenset((Unit(int(match[1]), match[2]), match[3]) for match in matches)
        for unit, estimate in scored - self._read.keys():
            self._read[unit, estimate] = self._holds_all(unit, estimate)
        return Listed(
            steps=frozenset(checkpoint.steps(self.directory.checkpoints)),
            scored=scored,
            full=frozenset(key for key in scored if self._read[key]),
            damaged=frozenset(int(match[1]) for match in map(_DAMAGED.fullmatch, files) if match),
        )

    def _damaged(self, step: int) -> Path:
        return self.directory.scores / f"step_{step:08d}-damaged.json"

    def _holds_all(self, unit: Unit, estimate: str) -> bool:
        """Whether an estimate of a unit is scored in full, on what the set holds now."""
        return _is_full(self.directory.scores / f"{unit}-{estimate}.json", self.data.get(unit.set_name))


def parts_of(run: RunDirectory, stages: Sequence[int]) -> list[Part]:
    """All parts of some stages of a run that may hold checkpoints, started or not."""
    return [Part(run, number, refit=refit) for number in stages for refit in (False, True)]


def stamp(path: Path) -> tuple[int, int, int] | None:
    """Tells a file from every other that stood or will stand at its path; None where there is none."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)  # noqa: PTH208  (a Path for each name costs ten times the listing)
    except FileNotFoundError:
        return []


def _is_full(path: Path, data: Mapping[str, str] | None) -> bool:
    """Whether a score file holds all there is to score of the set of that digest; one that is torn or gone does not."""
    try:
        score = json.loads(path.read_text())
        return score.get("full") is True and not on_other_data(score, data)
    except (OSError, ValueError, AttributeError):
        return False
