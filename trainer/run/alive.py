"""Whether another process still lives, for whoever might take its work over: seen here, or told by its counter.

A process writes into what it holds (a stage directory, a claim) who it is and, every few seconds, a counter. On the
same machine others look for the process itself. From another machine only the counter tells, measured against the
watcher's own clock: the clocks of other hosts are never trusted.
"""

from __future__ import annotations

import functools
import os
import platform
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Owner:
    """A process, such that others can tell whether it still runs.

    Attributes:
        host: its host's name, for people.
        pid: its number there.
        machine: tells apart the boots and containers in which one number is another process; empty where unknown.
        born: the kernel's tick at which it began, since numbers are used again; None where unknown.
    """

    host: str
    pid: int
    machine: str = ""
    born: int | None = None

    @classmethod
    def this(cls) -> Owner:
        """This process."""
        status = _status(os.getpid())
        return cls(platform.node(), os.getpid(), _machine(), status[1] if status else None)

    @classmethod
    def read(cls, facts: Mapping[str, Any]) -> Owner:
        """The one that wrote a start, a heartbeat or a claim."""
        return cls(facts["host"], facts["pid"], facts.get("machine", ""), facts.get("born"))

    def lives(self) -> bool | None:
        """Whether it runs; None where that cannot be seen from this machine."""
        if not self.machine or self.machine != _machine():
            return None
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass  # another user's; it is there
        status = _status(self.pid)
        if status is None or self.born is None:
            return True  # there, but hidden from us
        state, born = status
        return state not in "ZX" and born == self.born  # Z: killed, and not yet buried by its parent

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class CounterWatch:
    """Whether a counter that somebody else writes advances, by our clock alone; `advanced` once it has."""

    def __init__(self, stale_after_s: float) -> None:
        self.advanced = False
        self._stale_after_s = stale_after_s
        self._value: object = None
        self._since: float | None = None

    def still_s(self, value: object, now: float) -> float:
        """Note the counter at a time of our clock; returns for how many seconds it has stood still."""
        if self._since is None or value != self._value:
            self.advanced = self._since is not None
            self._value, self._since = value, now
        return now - self._since

    def saw(self, value: object, now: float) -> bool | None:
        """Note the counter at a time of our clock.

        Returns:
            True if it has advanced, the last time less than `stale_after_s` ago; False if it has stood still for so
            long; None while neither can be told.
        """
        if self.still_s(value, now) >= self._stale_after_s:
            return False
        return True if self.advanced else None

    def lives(self, owner: Owner, value: object, now: float) -> bool | None:
        """Whether the owner of the counter lives: seen where it can be, else told by the counter as `saw` tells it."""
        seen = owner.lives()
        return self.saw((owner, value), now) if seen is None else seen


class Pulse:
    """Calls `beat` every few seconds from a thread, so that work that takes long does not look like death.

    A beat that the disk refuses is a warning, said once, and no end.
    """

    def __init__(self, path: Path, beat: Callable[[], None], every_s: float) -> None:
        self._path, self._beat, self._every_s = path, beat, every_s
        self._warned = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat_until_stopped, name=f"pulse of {path.name}", daemon=True)

    def start(self) -> None:
        """Beat at once, and from now on."""
        self.beat()
        self._thread.start()

    def beat(self) -> None:
        """Beat once."""
        try:
            self._beat()
        except OSError as error:
            if not self._warned:
                print(f"warning: {self._path} cannot be written: {error}", file=sys.stderr)
            self._warned = True

    def stop(self) -> bool:
        """Beat no more; False where a beat hangs, on a dead disk say, and must not be overtaken by another write."""
        self._stop.set()
        self._thread.join(timeout=2 * self._every_s)
        return not self._thread.is_alive()

    def _beat_until_stopped(self) -> None:
        while not self._stop.wait(self._every_s):
            self.beat()


def _status(pid: int) -> tuple[str, int] | None:
    """(state, tick of its start) of a process on this machine; None where it is not to be seen."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()  # the name before may hold anything
        return fields[0], int(fields[19])
    except (OSError, ValueError, IndexError):
        return None


@functools.cache
def _machine() -> str:
    """This boot of this host, and the process numbers that are seen from here (containers have their own)."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""
