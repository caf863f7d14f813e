"""Progress of long work: a bar on a terminal, nothing in a log file (there the results themselves are lines)."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")


def progress(items: Iterable[Item], title: str, total: int) -> Iterator[Item]:
    """The items, with a bar on stderr where that is a terminal."""
    return iter(tqdm(items, desc=title, total=total, leave=False, disable=not sys.stderr.isatty()))


def say(line: str) -> None:
    """Print a line to stdout without tearing a bar apart."""
    tqdm.write(line)
    sys.stdout.flush()
