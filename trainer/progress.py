"""How long work shows itself, and how it says that it goes on.

A loop over pieces of long work runs through `watched`, and one piece that takes longer than a few seconds calls
`alive()` as it goes on (a solver once a step, say). Both show where the work is, as a bar on a terminal or as a line
about every 20 s in a log file, and both call the listeners: the watchdog, which ends a process that has not been alive
for long, and a worker's wish to stop.

What a listener raises comes out of `watched` and `alive`. On several ranks they are therefore called only where an
OSError of one rank is raised on all: inside `shares.in_order` and `Processes.first`.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from tqdm import tqdm

Item = TypeVar("Item")
Tick = Callable[[str], None]
"""Called with the name of each piece of work that is done."""

LINE_EVERY_S = 20.0
"""In a log, work that goes on gives a line about so often."""
CALL_EVERY_S = 5.0
"""How often `unbroken` says for a call that it goes on."""
LEAST_RATE = 1e9
"""Operations a second that the slowest machine does: bounds for how long one call of a library may take."""
_REDRAW_EVERY_S = 0.5

_listeners: list[Callable[[], None]] = []


def silent(_: str) -> None:
    """The tick of work that nobody watches."""


@contextlib.contextmanager
def progress(total: int, unit: str) -> Iterator[Tick]:
    """A tick for each of `total` pieces of work; without a terminal about every tenth of them gives a line."""
    done = 0
    with tqdm(total=total, unit=unit, disable=not sys.stderr.isatty()) as bar:

        def tick(name: str) -> None:
            nonlocal done
            done += 1
            if not bar.disable:
                bar.set_postfix_str(name, refresh=False)
                bar.update()
            elif done == total or done % max(total // 10, 1) == 0:
                print(f"{done}/{total} {unit}s: {name}", flush=True)
            alive()

        yield tick


@dataclass(eq=False)
class _Loop:
    """A loop under way that is shown."""

    title: str
    total: int
    bar: Any
    begun: float
    done: int = 0

    def __str__(self) -> str:
        return f"{self.title} {self.done}/{self.total}"


class _Display:
    """The loops under way, the outermost first: as bars on a terminal, or as one line about them all."""

    def __init__(self) -> None:
        self._loops: list[_Loop] = []
        self._said = self._heard = float("-inf")

    def begin(self, title: str, total: int) -> _Loop:
        """Show a loop, inside of those that are shown."""
        now = time.monotonic()
        if now - self._heard > LINE_EVERY_S:  # loops that follow each other are one work, which gives lines
            self._said = now
        self._heard = now
        bar = tqdm(desc=title, total=total, leave=False, disable=not sys.stderr.isatty())
        self._loops.append(_Loop(title, total, bar, now))
        return self._loops[-1]

    def advance(self, loop: _Loop) -> None:
        """A piece of a loop is done."""
        loop.done += 1
        loop.bar.update()

    def end(self, loop: _Loop) -> None:
        """Show a loop no longer."""
        loop.bar.close()
        self._loops.remove(loop)

    def refresh(self) -> None:
        """Show how much time has passed, if it is time to."""
        if not self._loops:
            return
        now = self._heard = time.monotonic()
        terminal = not self._loops[0].bar.disable
        if now - self._said < (_REDRAW_EVERY_S if terminal else LINE_EVERY_S):
            return
        self._said = now
        if terminal:
            for loop in self._loops:
                loop.bar.refresh()
            return
        passed = tqdm.format_interval(now - self._loops[0].begun)
        print(f"{', '.join(map(str, self._loops))} ({passed})", file=sys.stderr, flush=True)


_display = _Display()


def watched(items: Iterable[Item], title: str, total: int, *, visible: bool = True) -> Iterator[Item]:
    """The items, shown as they are done; for work whose results are lines of their own. Listeners hear of each.

    Loops may stand inside of each other. Raises what a listener raises.
    """
    loop = _display.begin(title, total) if visible else None
    try:
        for item in items:
            yield item
            if loop is not None:
                _display.advance(loop)
            alive()
    finally:
        if loop is not None:
            _display.end(loop)


def alive() -> None:
    """Say that work goes on, from inside of a piece of it. Raises what a listener raises."""
    for listener in _listeners:
        listener()
    _display.refresh()


@contextlib.contextmanager
def unbroken(most_s: float) -> Iterator[None]:
    """Around one call of a library that cannot say that it goes on: a thread says it instead.

    It does so for `most_s` seconds at most: a call that hangs is ended by the watchdog after that. What a listener
    raises is raised when the call is over.
    """
    over = threading.Event()
    raised: list[Exception] = []

    def speak() -> None:
        deadline = time.monotonic() + most_s
        while not over.wait(CALL_EVERY_S) and time.monotonic() < deadline and not raised:
            try:
                alive()
            except Exception as error:
                raised.append(error)

    thread = threading.Thread(target=speak, name="unbroken", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    if raised:
        raise raised[0]


@contextlib.contextmanager
def listening(listener: Callable[[], None]) -> Iterator[None]:
    """Inside the `with` block `listener` is called whenever work goes on."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def say(line: str) -> None:
    """Print a line to stdout without tearing a bar apart."""
    tqdm.write(line)
    sys.stdout.flush()
