"""A signal becomes a wish that the training reads at a step boundary, where it writes a checkpoint and ends."""

from __future__ import annotations

import signal
import threading
import time
from typing import Any, NoReturn

AGAIN_SECONDS = 1.0
"""torchrun hands on a Ctrl-C that the terminal has already sent; a person takes longer to press it twice."""


class Interrupted(Exception):
    """A signal ended the training at a step boundary, after its checkpoint was written, or before the first step."""

    def __init__(self, signum: int, step: int) -> None:
        where = f"at step {step}; the checkpoint is written" if step else "before the first step"
        super().__init__(f"{signal.Signals(signum).name} {where}")
        self.signum = signum
        self.step = step

    def __reduce__(self) -> tuple[object, ...]:
        # one that ended the main process's work reaches the other ranks through pickle
        return Interrupted, (self.signum, self.step)


class StopRequest:
    """Makes the first signal a wish to end, and ignores those after it, but for a person's second Ctrl-C.

    SLURM sends SIGTERM, or SIGUSR1 and SIGUSR2 where it was asked to, before a time limit or a preemption, and may send
    several. A SIGINT that comes a second or more after the first signal ends at once.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)

    def __init__(self) -> None:
        self._signum = 0
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, signum: int, _: object) -> None:
        now = time.monotonic()
        if not self._signum:
            self._signum, self._since = signum, now
        elif signum == signal.SIGINT and now - self._since >= AGAIN_SECONDS:
            signal.signal(signum, self._before[signum])
            signal.raise_signal(signum)

    @property
    def signum(self) -> int:
        """The signal that asked this process to end; 0 without one."""
        return self._signum

    @property
    def requested(self) -> bool:
        """Whether this process was asked to end."""
        return self._signum != 0

    def pause(self, seconds: float) -> None:
        """Wait so long, or until there is a wish to end."""
        deadline = time.monotonic() + seconds
        while not self.requested and time.monotonic() < deadline:
            time.sleep(min(0.1, seconds))

    def leave(self, step: int, signum: int = 0) -> NoReturn:
        """End the training, on the signal that the ranks agreed on, else on this process's own. Raises Interrupted."""
        raise Interrupted(signum or self._signum, step)
