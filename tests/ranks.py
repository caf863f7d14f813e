"""Ranks that are threads of the test: what they exchange is pickled as between processes, and no wait is unbounded."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from trainer.errors import InputError
from trainer.run.signals import Interrupted

Result = TypeVar("Result")
TIMEOUT_S = 60
KNOWN = (InputError, Interrupted)
"""What the main process's work may raise on all ranks."""


class Meeting:
    """Where the ranks wait for each other and lay down what they exchange."""

    def __init__(self, world: int) -> None:
        self.barrier = threading.Barrier(world, timeout=TIMEOUT_S)
        self.values: list[bytes] = [b""] * world


class ThreadRank:
    """One rank of a `Meeting`."""

    device = torch.device("cpu")

    def __init__(self, rank: int, meeting: Meeting) -> None:
        self.rank, self.meeting, self.world = rank, meeting, len(meeting.values)
        self.is_main = rank == 0

    def gather_objects(self, value: Any) -> list[Any]:
        self.meeting.values[self.rank] = pickle.dumps(value)
        self.meeting.barrier.wait()
        values = [pickle.loads(data) for data in self.meeting.values]
        self.meeting.barrier.wait()  # nobody lays down the next before all have read
        return values

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        total = values.double()
        for number, other in enumerate(self.gather_objects(total)):
            total = other if number == 0 else total + other
        return total.to(values.dtype)

    def share(self, items: Sequence[Any]) -> Sequence[Any]:
        return items[self.rank :: self.world]

    def first(self, action: Callable[[], Any]) -> Any:
        outcome = None
        if self.is_main:
            try:
                outcome = action()
            except KNOWN as error:
                outcome = error
        outcome = self.gather_objects(outcome)[0]
        if isinstance(outcome, KNOWN):
            raise outcome
        return outcome


def on_ranks(world: int, work: Callable[[ThreadRank], Result]) -> list[Result]:
    """What `work` returns on each rank; where it raises on one, the others are not left waiting."""
    meeting = Meeting(world)

    def run(rank: int) -> Result:
        torch.set_num_threads(1)  # a setting of each thread
        try:
            return work(ThreadRank(rank, meeting))
        except BaseException:
            meeting.barrier.abort()
            raise

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(run, range(world)))
