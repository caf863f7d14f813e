"""Who trains in a stage directory, and whether that training still lives.

    starts/3.json     the third start: its host, process and versions; one process alone can make it (files.write_new)
    heartbeat.json    what the newest start does, every few seconds: step, counter, and at last how it `ended`

The newest start owns the directory for as long as it lives. From the same machine its process is looked for; from
another its counter must advance within `STALE_AFTER_S` of the watcher's own clock: clocks of other hosts are never
trusted. A process that finds a newer start than its own was taken for dead (it slept, its disk hung): it must stop.
Where SLURM says that a start is over, since it runs its job again or the next job of a chain, nobody waits for it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from trainer.errors import InputError
from trainer.run.alive import CounterWatch, Owner, Pulse
from trainer.run.files import as_json, names, read_object, write_json, write_new

BEAT_EVERY_S = 5.0
STALE_AFTER_S = 30.0
LOOK_EVERY_S = 0.5

_NOBODY = {"host": "a host that has not said its name", "pid": 0}
"""The owner of a start that was just made, where the file system has no hard links, or whose maker died meanwhile."""


class Pace:
    """Steps per second over the last minutes of one phase, with all that comes between: validations, checkpoints."""

    def __init__(self, sights: int = 61) -> None:
        self._seen: deque[tuple[float, int]] = deque(maxlen=sights)
        self._title = ""

    def saw(self, title: str, step: int, now: float) -> float | None:
        """Note the step of a phase at a time; returns steps per second, None while that cannot be told."""
        if title != self._title or (self._seen and step < self._seen[-1][1]):
            self._seen.clear()
        self._title = title
        self._seen.append((now, step))
        (first, start), (last, end) = self._seen[0], self._seen[-1]
        return (end - start) / (last - first) if end > start and last > first else None


def newest_start(folder: Path) -> int:
    """The number of the newest start in a stage directory; 0 where nobody has started."""
    starts = (name.removesuffix(".json") for name in names(folder / "starts") if name.endswith(".json"))
    return max((int(start) for start in starts if start.isdigit()), default=0)


def read_heartbeat(folder: Path) -> dict[str, Any] | None:
    """What the newest start last said of itself; of one that was killed before it said anything, who it is.

    None where nobody has started. Raises InputError for a file that cannot be read, or is torn.
    """
    return _newest_beat(folder, lambda path: read_object(path, "host", "pid"))


def _newest_beat(folder: Path, read_start: Callable[[Path], Mapping[str, Any]]) -> dict[str, Any] | None:
    number, path = newest_start(folder), folder / "heartbeat.json"
    if not number:
        return None
    beat = read_object(path) if path.exists() else {}
    if beat.get("start") == number:
        return dict(beat)
    start = read_start(_path_of(folder, number))
    begun = {"step": 0, "total": 0, "title": "", "time": start.get("time", 0.0), "start": number, "count": 0}
    return {**begun, **asdict(Owner.read(start))}


def holder(folder: Path, *, patience_s: float | None = None) -> dict[str, Any] | None:
    """The heartbeat of another process that trains in a stage directory; None where there is none.

    Where only the counter can tell, it is watched for `patience_s` (`STALE_AFTER_S` if not given); with 0 an unknown
    one counts as living.
    """
    patience = STALE_AFTER_S if patience_s is None else patience_s
    watch = CounterWatch(patience)
    told = False
    while True:
        beat = _newest_beat(folder, _owned)
        if beat is None or "ended" in beat:
            return None
        owner = Owner.read(beat)
        if owner == Owner.this():  # an earlier training of this very process is over
            return None
        if is_over(_read_start(_path_of(folder, beat["start"])).get("slurm", {}), os.environ):
            return None
        counter = (beat["start"], beat["count"])
        lives = watch.lives(owner, counter, time.monotonic()) if patience else owner.lives()
        if lives is not None or not patience:
            return None if lives is False else beat
        if not told:
            print(f"{folder}: waiting up to {patience:.0f} s for a sign of life of {owner}", file=sys.stderr)
            told = True
        time.sleep(LOOK_EVERY_S)


def is_over(start: Mapping[str, str], environment: Mapping[str, str]) -> bool:
    """Whether a start is over by SLURM's word, whatever its counter looks like.

    SLURM starts a job again only after it has ended it, and a job that waits for others (`FMRI_FLOW_EARLIER`, which
    the batch script sets) only after those.

    Args:
        start: its variables of SLURM, as starts/<n>.json keeps them.
        environment: of this process.
    """
    job = start.get("SLURM_JOB_ID")
    if not job:
        return False
    names = {job, f"{start.get('SLURM_ARRAY_JOB_ID')}_{start.get('SLURM_ARRAY_TASK_ID')}"}
    if names & set(environment.get("FMRI_FLOW_EARLIER", "").split()):
        return True
    restart = int(start.get("SLURM_RESTART_COUNT") or 0)
    return job == environment.get("SLURM_JOB_ID") and restart < int(environment.get("SLURM_RESTART_COUNT") or 0)


def _path_of(folder: Path, number: int) -> Path:
    return folder / "starts" / f"{number}.json"


def _owned(path: Path) -> Mapping[str, Any]:
    """What a start says of itself, or that nobody knows whose it is: its counter will tell whether anyone is there."""
    return _read_start(path) or _NOBODY


def _read_start(path: Path) -> dict[str, Any]:
    """What a start says of itself; nothing where it is torn or was deleted. Raises OSError: it cannot be read."""
    try:
        facts = json.loads(path.read_text())
        Owner.read(facts)
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return {}
    return dict(facts)


def sign_of_life(folder: Path) -> object:
    """What differs from look to look while somebody trains in a stage directory, and is the same while nobody does.

    For who looks now and then and does not wait: a `CounterWatch` tells how long it has stood still.
    """
    beat = _newest_beat(folder, _owned)
    if beat is None:
        return None
    lives = False if "ended" in beat else Owner.read(beat).lives()
    return (beat["start"], beat["count"], time.monotonic() if lives else None)


def describe(beat: Mapping[str, Any]) -> str:
    """The holder of a stage directory in words."""
    doing = f"{beat['title']}, step {beat['step']} of {beat['total']}" if beat["title"] else "starting"
    return f"{Owner.read(beat)} ({doing})"


def refuse_held(folder: Path) -> None:
    """Raise InputError where another training lives in a stage directory."""
    held = holder(folder)
    if held is not None:
        raise InputError(
            folder,
            "another training runs there",
            found=describe(held),
            fix=f"Look at it with `python -m trainer status {folder.parent}`, end it with `kill {held['pid']}` on "
            f"{held['host']}, or choose another --run.",
        )


def begin(folder: Path, facts: Mapping[str, Any]) -> int:
    """Make the next starts/<n>.json of a stage directory, and the first heartbeat; returns n.

    Dead and ended starts are taken over.

    Args:
        folder: the stage directory.
        facts: what the start should remember, beside host and process.

    Raises:
        InputError: another training lives there.
    """
    owner = asdict(Owner.this())
    while True:
        number = newest_start(folder) + 1
        refuse_held(folder)
        if write_new(_path_of(folder, number), as_json({**facts, **owner})):
            break  # else another was faster: look at that one
    for left in folder.glob(".heartbeat.json.*"):
        left.unlink(missing_ok=True)  # of killed writers
    _write(folder, number, 0, {"step": 0, "total": 0, "title": ""})
    return number


class Heartbeat:
    """Writes heartbeat.json from a thread, so that validations and long waits do not look like death.

    `superseded` becomes True when a newer start owns the directory (or the directory is gone): the training must stop,
    and nothing more is written here.
    """

    def __init__(self, folder: Path, start: int) -> None:
        self.superseded = False
        self._folder, self._start, self._owner = folder, start, Owner.this()
        self._place: tuple[str, int, int] = ("", 0, 0)
        self._pace, self._count = Pace(), 0
        self._ending: dict[str, Any] = {}
        self._pulse = Pulse(folder / "heartbeat.json", self._beat, BEAT_EVERY_S)

    def at(self, step: int, total: int, title: str) -> None:
        """Say how far the training is; costs nothing, the next beat writes it."""
        self._place = (title, step, total)

    def __enter__(self) -> Heartbeat:
        self._pulse.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._pulse.stop():
            self._ending = {"ended": _ending(error)}
            self._pulse.beat()

    def _beat(self) -> None:
        self.superseded = self.superseded or not self._holds()
        if self.superseded:
            return
        title, step, total = self._place
        self._count += 1
        pace = self._pace.saw(title, step, time.monotonic())
        place = {"step": step, "total": total, "title": title, "steps_per_s": pace}
        _write(self._folder, self._start, self._count, {**place, **self._ending})

    def _holds(self) -> bool:
        """Whether the newest start is this one, and no namesake in a directory that was deleted and made again.

        Its owner tells, since FUSE and FAT give a file another inode, or another time, while nobody touches it.
        """
        if newest_start(self._folder) != self._start:
            return False
        start = _read_start(_path_of(self._folder, self._start))
        return bool(start) and Owner.read(start) == self._owner


def _write(folder: Path, start: int, count: int, facts: Mapping[str, Any]) -> None:
    beat = {**facts, "time": time.time(), **asdict(Owner.this()), "start": start, "count": count}
    write_json(folder / "heartbeat.json", beat)


def _ending(error: BaseException | None) -> dict[str, str]:
    """How a training ended, from what left it: nothing, a signal's wish (`signum`) or Ctrl-C, or a failure."""
    if error is None:
        return {"state": "finished", "why": ""}
    if isinstance(error, InputError):
        return {"state": "failed", "why": str(error)}
    interrupted = isinstance(error, KeyboardInterrupt) or hasattr(error, "signum")
    name = type(error).__name__
    why = str(error) or name if interrupted else f"{name}: {error}"
    return {"state": "interrupted" if interrupted else "failed", "why": " ".join(why.split())[:500]}
