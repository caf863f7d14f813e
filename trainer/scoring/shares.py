"""Work on whole runs that the ranks share, with the same result as one process alone.

Items are dealt round: rank r of `world` takes items r, r + world, ... and does each of them whole. What comes out is
put back in the items' order on every rank, so whatever is summed up from it is summed in that order, and is the same
to the last bit for any number of ranks (that compute with the same number of threads).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from trainer.errors import InputError
from trainer.progress import watched

Item = TypeVar("Item")

_SUMMED_AT_ONCE = 2**20
"""Numbers that a rank sends at once where arrays are summed up, 8 MiB."""


class Ranks(Protocol):
    """What sharing asks of the processes of a launcher; all ranks make the same calls in the same order."""

    @property
    def rank(self) -> int:
        """0, 1, ... `world` - 1."""

    @property
    def world(self) -> int:
        """How many there are."""

    @property
    def is_main(self) -> bool:
        """Whether this one prints, and writes what is written once."""

    @property
    def device(self) -> torch.device:
        """Where this one computes."""

    def gather_objects(self, value: Item) -> list[Item]:
        """The values of all ranks in the order of the ranks, on every rank."""

    def sum(self, values: Tensor) -> Tensor:
        """The sum of a tensor over all ranks, the same bits on every rank."""

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """The items that this rank is dealt: every world-th from its own number on."""

    def first(self, action: Callable[[], Item]) -> Item:
        """Let the main process act while the others wait; all get its value, or raise its error."""


@dataclass(frozen=True)
class OneProcess:
    """The ranks of a process that is alone."""

    device: torch.device
    rank: int = 0
    world: int = 1
    is_main: bool = True

    def gather_objects(self, value: Item) -> list[Item]:
        """Its own value."""
        return [value]

    def sum(self, values: Tensor) -> Tensor:
        """Its own values."""
        return values

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """All of them."""
        return items

    def first(self, action: Callable[[], Item]) -> Item:
        """Act."""
        return action()


def in_order(processes: Ranks, work: Callable[[], Sequence[Item]]) -> list[Item]:
    """Let every rank work on the items that it is dealt; the results of all, in the order of the items, on every rank.

    `work` gives one result for each of the rank's items, none where there are fewer items than ranks.

    Raises:
        InputError, OSError: on every rank, where `work` raised it on one: none waits for a rank that has gone.
    """
    outcome: Sequence[Item] | InputError | OSError
    try:
        outcome = work()
    except (InputError, OSError) as error:
        outcome = error
    dealt: list[Sequence[Item]] = []
    for found in processes.gather_objects(outcome):
        if isinstance(found, InputError | OSError):
            raise outcome if isinstance(outcome, Exception) else found  # its own, where it has one, with the traceback
        dealt.append(found)
    return [dealt[i % len(dealt)][i // len(dealt)] for i in range(sum(map(len, dealt)))]


def summed(processes: Ranks, integers: np.ndarray) -> np.ndarray:
    """The sum over the ranks of their arrays of integers, on every rank.

    It is gathered in parts: what a rank holds does not grow with the number of ranks.
    """
    if processes.world == 1:
        return integers
    flat, total = integers.reshape(-1), np.zeros(integers.size, integers.dtype)
    for start in range(0, len(flat), _SUMMED_AT_ONCE):
        part = slice(start, start + _SUMMED_AT_ONCE)
        total[part] = sum(processes.gather_objects(flat[part]))
    return total.reshape(integers.shape)


def shown(processes: Ranks, items: Iterable[Item], title: str, total: int) -> Iterable[Item]:
    """This rank's items; the main process shows how far it is with its share of `total`."""
    return watched(items, title, len(processes.share(range(total))), visible=processes.is_main)
