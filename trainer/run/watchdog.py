"""Ends a rank that makes no progress, or waits for one that makes none, and says which: rank, host and last step.

A rank that dies or hangs leaves the others in a collective that may never end. So each rank has a watchdog: the
training marks its progress, the watchdog tells the other ranks of it through the store of torch.distributed, and where
nothing was marked for `timeout_s` it prints what it knows of the others and every Python stack, and ends the process.

A rank that waits for others marks nothing meanwhile. It is left alone as long as any rank marks progress: one that has
scored its share waits for hours, if need be, for one that still scores. All ranks' marks are counted under one key of
the store, so this costs each rank a request every 2 s, however many there are.
"""

from __future__ import annotations

import contextlib
import faulthandler
import itertools
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from types import TracebackType
from typing import NoReturn

from torch.distributed import TCPStore

from trainer.errors import InputError
from trainer.run.processes import Processes
from trainer.run.signals import Interrupted

NEWS_SECONDS = 2.0
"""How often a rank tells the others of itself."""
SILENT_SECONDS = 5.0
"""A rank that has told nothing new for so long is dead, or stopped, or cut off."""
LISTEN_SECONDS = 10.0
"""How long before its end a rank begins to listen to all others: a thousand that always listened would be loud."""
NAMED = 8
"""No more ranks than this are named in a message."""
OF_OTHERS = ("gloo", "nccl", "closed by peer", "reset by peer", "broken pipe", "timed out")
"""What the error of a collective says where another rank is at fault."""

_MARKS = "fmri-flow/marks"
"""The key under which all ranks' marks of progress are counted."""

_trainings = itertools.count(1)


@dataclass(frozen=True)
class News:
    """What a rank tells of itself. `training` counts the trainings of a process; `count` grows as long as it lives."""

    rank: int
    host: str
    training: int
    step: int
    count: int
    error: str = ""

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}"


class Hearsay:
    """What is known of the other ranks, and for how long they have told nothing new, by this machine's clock."""

    def __init__(self) -> None:
        self._heard: dict[int, tuple[News, float]] = {}

    def hear(self, news: News, now: float) -> None:
        """Take in what a rank told last, whenever that was."""
        known = self._heard.get(news.rank)
        if known is None or known[0] != news:
            self._heard[news.rank] = (news, now)

    def step_of(self, rank: int) -> int | None:
        """The last step that is known of a rank."""
        return self._heard[rank][0].step if rank in self._heard else None

    def lost(self, now: float) -> list[str]:
        """The ranks that failed, then those that are silent, with their last known step."""
        failed, silent = [], []
        for _, (news, since) in sorted(self._heard.items()):
            if news.error:
                failed.append(f"{news} failed after step {news.step}: {news.error}")
            elif now - since > SILENT_SECONDS:
                silent.append(f"{news} is silent, and last told of step {news.step}")
        return failed + silent

    def slow(self, training: int, step: int, now: float) -> list[str]:
        """The ranks that live and are less far than this step; news are a moment old."""
        return [
            f"{news} is at step {news.step}"
            for _, (news, since) in sorted(self._heard.items())
            if not news.error and now - since <= SILENT_SECONDS and (news.training, news.step) < (training, step)
        ]


class Gossip:
    """A thread that tells the other ranks how far this one is, and listens to them when asked to.

    It has a connection of its own to the store, as those of torch block each other; the store may be gone with its
    rank, so nobody waits for this thread without a bound.
    """

    def __init__(self, processes: Processes) -> None:
        self.step, self.marks, self._error = 0, 0, ""
        self._rank, self._world, self._host = processes.rank, processes.world, processes.host
        self._training = next(_trainings)
        self._hearsay = Hearsay()
        self._answered = self.moved = time.monotonic()
        """When another rank made progress last, by this machine's clock, or a little earlier."""
        self._listening, self._soon, self._told, self._done = (threading.Event() for _ in range(4))
        self._thread = threading.Thread(target=self._talk, name="gossip", daemon=True)
        self._thread.start()

    def listen(self) -> None:
        """From now on, hear all ranks."""
        if not self._listening.is_set():
            self._listening.set()
            self._soon.set()

    def confess(self, error: str) -> None:
        """Tell the others, before this rank ends, that it failed."""
        self._error = error
        self._told.clear()
        self._soon.set()
        self._told.wait(NEWS_SECONDS)

    def lost(self) -> list[str]:
        """The ranks that are no more, with what is known of them."""
        known = self._hearsay.lost(self._answered)
        if time.monotonic() - self._answered > SILENT_SECONDS:
            host, step = os.environ.get("MASTER_ADDR"), self._hearsay.step_of(0)
            last = "" if step is None else f", and rank 0 last told of step {step}"
            known.append(f"the store at {host}, which ends with rank 0 or its launcher, does not answer{last}")
        return known

    def slow(self) -> list[str]:
        """The ranks that are less far than this one."""
        return self._hearsay.slow(self._training, self.step, self._answered)

    def close(self) -> None:
        """End the thread, or leave it where the store does not answer."""
        self._done.set()
        self._soon.set()
        self._thread.join(NEWS_SECONDS)

    def _talk(self) -> None:
        # a store that is gone leaves the training to its own errors
        with contextlib.suppress(RuntimeError, ValueError):
            host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            bound = timedelta(seconds=LISTEN_SECONDS)
            store = TCPStore(host, port, is_master=False, timeout=bound, wait_for_workers=False)
            told = known = 0
            for count in itertools.count():
                marks = self.marks
                total, told = store.add(_MARKS, marks - told), marks
                if total - told != known:
                    # its marks may be as old as their way took, and never count for longer than its own watchdog says
                    self.moved, known = time.monotonic() - 2 * NEWS_SECONDS, total - told
                news = News(self._rank, self._host, self._training, self.step, count, self._error)
                store.set(f"fmri-flow/{self._rank}", json.dumps(asdict(news)))
                for heard in self._read(store):
                    self._hearsay.hear(heard, time.monotonic())
                self._answered = time.monotonic()
                self._told.set()
                self._soon.wait(NEWS_SECONDS / 4 if self._listening.is_set() else NEWS_SECONDS)
                self._soon.clear()
                if self._done.is_set():
                    return

    def _read(self, store: TCPStore) -> Iterator[News]:
        # the store mostly dies with rank 0, whose last step is then known
        for rank in range(self._world) if self._listening.is_set() else [0]:
            key = f"fmri-flow/{rank}"
            if rank != self._rank and store.check([key]):
                yield News(**json.loads(store.get(key)))


class Watchdog:
    """`with Watchdog(processes, timeout_s) as watch: ... watch.alive(step)`.

    An exception that leaves it gets a note with this rank, its host and its last step; where a collective failed,
    because of another rank, also what is known of that one.
    """

    def __init__(self, processes: Processes, timeout_s: float) -> None:
        self._processes = processes
        self._timeout_s = timeout_s
        self._step = 0
        self._marked = time.monotonic()
        self._gossip: Gossip | None = None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._marked = time.monotonic()
        if self._processes.world > 1:
            self._gossip = Gossip(self._processes)
            self._processes.set_patience(watched=True)
        self._thread.start()
        return self

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None) -> None:
        self._done.set()
        self._thread.join()
        if self._gossip is None:
            return
        self._processes.set_patience(watched=False)
        if isinstance(error, Exception) and not isinstance(error, InputError | Interrupted):
            self._explain(error, self._gossip)
        self._gossip.close()

    def alive(self, step: int | None = None) -> None:
        """Mark progress: at a step, or, without one, inside work between two steps."""
        self._marked = time.monotonic()
        if self._gossip is not None:
            self._gossip.marks += 1
        if step is not None:
            self._step = step
            if self._gossip is not None:
                self._gossip.step = step

    def _watch(self) -> None:
        tick = min(1.0, self._timeout_s / 10)
        last = time.monotonic()
        while not self._done.wait(tick):
            now = time.monotonic()
            self._marked += max(0.0, now - last - 2 * tick)  # what this process was stopped for does not count
            last = now
            idle = now - self._marked
            if self._gossip is not None and self._processes.is_waiting:
                idle = min(idle, now - self._gossip.moved)
            if self._gossip is not None and idle > self._timeout_s - LISTEN_SECONDS:
                self._gossip.listen()
            if idle > self._timeout_s:
                self._end()

    def _end(self) -> NoReturn:
        """Say what is known and end this process and its children, whatever it waits for."""
        known = _named(self._gossip.lost() + self._gossip.slow()) if self._gossip else ""
        print(f"watchdog: {self._place()}: no progress for {self._timeout_s:g} s. {known}", file=sys.stderr)
        sys.stderr.flush()
        sys.stdout.flush()
        faulthandler.dump_traceback(all_threads=True)
        for child in multiprocessing.active_children():
            child.kill()
        os._exit(1)

    def _explain(self, error: Exception, gossip: Gossip) -> None:
        note = self._place()
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if any(words in str(error).lower() for words in OF_OTHERS):
            # torchrun sends SIGTERM as soon as it sees the other rank's end; who that was is to be said first
            with _deaf_to(signal.SIGTERM):
                gossip.listen()
                until = time.monotonic() + LISTEN_SECONDS
                while not gossip.lost() and time.monotonic() < until:
                    time.sleep(NEWS_SECONDS / 10)
                note += f". {_named(gossip.lost())}"
                print(f"{note} ({text})", file=sys.stderr, flush=True)
        else:
            gossip.confess(text)
        error.add_note(note)

    def _place(self) -> str:
        processes = self._processes
        return f"rank {processes.rank} of {processes.world} on {processes.host}, after step {self._step}"


def _named(ranks: list[str]) -> str:
    """What is known of the ranks that are waited for, as a sentence."""
    if not ranks:
        return "No rank is known to be behind; the stacks of all say who waits for whom."
    more = f"; and {len(ranks) - NAMED} more" if len(ranks) > NAMED else ""
    return f"Behind: {'; '.join(ranks[:NAMED])}{more}."


@contextlib.contextmanager
def _deaf_to(number: signal.Signals) -> Iterator[None]:
    """Ignore a signal for a moment (in the main thread; elsewhere signals are not ours to set)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(number, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(number, before)
