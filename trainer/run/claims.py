"""Claims on pieces of work that any number of processes share, on any hosts that see one folder.

    claims/step_00000500-val.2.json    the second claim on one piece: host, process, and a counter that advances

One process alone can make a file (`files.write_new`), so exactly one has the n-th claim; the newest counts. One whose
owner is dead (its process is gone from this machine, or its counter stands still for `STALE_AFTER_S` of our clock:
clocks of other hosts are never trusted) is taken over by making the next number. An owner that finds itself overtaken
(it slept, its disk hung) has lost the claim and must write nothing more. A claim without an owner was just made, where
the file system has no hard links, or its maker died meanwhile: it is one whose counter stands still. A released claim
leaves no file.
"""

from __future__ import annotations

import contextlib
import json
import re
import time
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from trainer.errors import InputError
from trainer.run.alive import CounterWatch, Owner, Pulse
from trainer.run.files import as_json, names, write_json, write_new

BEAT_EVERY_S = 5.0
STALE_AFTER_S = 30.0

_FILE = re.compile(r"(?P<name>[^.][^/]*)\.(?P<number>\d+)\.json")
_NOBODY = Owner("an unreadable claim", 0)


class ClaimLost(OSError):
    """Another process has taken a claim over, as its owner showed no life."""


class Claims:
    """The claims in one folder, as this process sees them now and then; nothing here waits."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._watches: dict[str, CounterWatch] = {}

    def names(self) -> set[str]:
        """The pieces of work that are claimed, by the living or the dead."""
        return set(_newest(self._folder))

    def take(self, name: str) -> Claim | None:
        """The claim on a piece of work, if nobody has it, or who has it is dead.

        Where only the counter can tell, it has to be seen standing still: such a claim is taken in a later call.

        Raises:
            InputError: the folder of claims cannot be written.
        """
        number = _newest(self._folder).get(name, 0)
        if number and self._lives(name, number) is not False:
            return None
        self._watches.pop(name, None)
        claim = Claim(self._folder, name, number + 1)
        return claim if claim.begin() else None  # else another was faster

    def _lives(self, name: str, number: int) -> bool | None:
        """Whether the owner of a claim lives; None while that cannot be told."""
        try:
            facts = _read(_path(self._folder, name, number))
        except FileNotFoundError:
            return None  # released since; the next call finds it free
        owner = Owner.read(facts) if facts else _NOBODY
        watch = self._watches.setdefault(name, CounterWatch(STALE_AFTER_S))
        return watch.lives(owner, (number, facts.get("count")), time.monotonic())


class Claim:
    """A claim of this process: `with` it the work is done. Leaving it releases the claim.

    `lost` becomes True when a beat finds that another has taken it over.
    """

    def __init__(self, folder: Path, name: str, number: int) -> None:
        self.lost = False
        self._folder, self._name, self._number = folder, name, number
        self._path = _path(folder, name, number)
        self._owner = asdict(Owner.this())
        self._count = 0
        self._pulse = Pulse(self._path, self._beat, BEAT_EVERY_S)

    def begin(self) -> bool:
        """Make the claim, unless another has made one of this number; from then on it beats.

        Raises:
            InputError: the folder of claims cannot be written.
        """
        try:
            made = write_new(self._path, as_json(self._content()))
        except OSError as error:
            fix = "Who scores a run writes into its directory."
            raise InputError(self._path.parent, f"cannot be written: {error.strerror}", fix=fix) from error
        if not made:
            return False
        with contextlib.suppress(OSError):  # they are overtaken all the same
            self._remove_older()
        self._pulse.start()
        return True

    def check(self) -> None:
        """Look whether the claim still holds, as has to be done right before the work's results are written.

        Raises:
            ClaimLost: it does not.
        """
        self.lost = self.lost or not self._holds()
        if self.lost:
            raise ClaimLost(f"{self._path}: another process has taken this work over, as this one showed no life")

    def release(self) -> None:
        """Give the work up, done or not: whoever looks next finds it free."""
        self._pulse.stop()
        with contextlib.suppress(OSError):  # a claim that cannot be removed dies with this process
            if self._holds():
                self._path.unlink()

    def __enter__(self) -> Claim:
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self.release()

    def _beat(self) -> None:
        self.lost = self.lost or not self._holds()
        if not self.lost:
            self._count += 1
            write_json(self._path, self._content())

    def _holds(self) -> bool:
        """Whether the newest claim is this one, and no namesake in a folder that was deleted and made again."""
        if _newest(self._folder).get(self._name) != self._number:
            return False
        try:
            facts = _read(self._path)
        except FileNotFoundError:
            return False
        return {key: facts.get(key) for key in self._owner} == self._owner

    def _content(self) -> dict[str, Any]:
        return {**self._owner, "count": self._count}

    def _remove_older(self) -> None:
        """Remove the claims of the dead before this one, and what their killed writers left."""
        for number in range(1, self._number):
            old = _path(self._folder, self._name, number)
            for left in (old, *self._folder.glob(f".{old.name}.*")):
                left.unlink(missing_ok=True)


def _path(folder: Path, name: str, number: int) -> Path:
    return folder / f"{name}.{number}.json"


def _newest(folder: Path) -> dict[str, int]:
    """The number of the newest claim on each claimed piece of work."""
    newest: dict[str, int] = {}
    for match in filter(None, map(_FILE.fullmatch, names(folder))):
        newest[match["name"]] = max(int(match["number"]), newest.get(match["name"], 0))
    return newest


def _read(path: Path) -> dict[str, Any]:
    """What a claim says; nothing where it is torn. Raises FileNotFoundError."""
    try:
        facts = json.loads(path.read_text())
        Owner.read(facts)
    except (ValueError, KeyError, TypeError):  # being made, or left by a host that lost power
        return {}
    return dict(facts)
