"""How long work shows itself: a bar on a terminal, plain lines in a log file."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

from tqdm import tqdm

Tick = Callable[[str], None]
"""Called with the name of each piece of work that is done."""


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
