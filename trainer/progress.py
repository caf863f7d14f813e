"""How long work shows itself: a bar on a terminal, plain lines in a log file."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")
Tick = Callable[[str], None]
"""Called with the name of each piece of work that is done."""

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

        yield tick


def watched(items: Iterable[Item], title: str, total: int, *, visible: bool = True) -> Iterator[Item]:
    """The items, with a bar that goes away; for work whose results are lines of their own. Listeners hear of each."""
    bar = tqdm(items, desc=title, total=total, leave=False, disable=not (visible and sys.stderr.isatty()))
    for item in bar:
        yield item
        for listener in _listeners:
            listener()


@contextlib.contextmanager
def listening(listener: Callable[[], None]) -> Iterator[None]:
    """Inside the `with` block `listener` is called for every piece of watched work that is done."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def say(line: str) -> None:
    """Print a line to stdout without tearing a bar apart."""
    tqdm.write(line)
    sys.stdout.flush()
