"""What ranks share comes back in order, and nobody waits for a rank that has failed."""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ranks import ThreadRank, on_ranks
from trainer.errors import InputError
from trainer.scoring import shares


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers()), st.integers(1, 5))
def test_results_come_back_in_the_order_of_the_items_on_every_rank(items: list[int], world: int) -> None:
    def work(rank: ThreadRank) -> list[int]:
        return shares.in_order(rank, lambda: [-item for item in rank.share(items)])

    wanted = [-item for item in items]
    assert on_ranks(world, work) == [wanted] * world
    alone = shares.OneProcess(torch.device("cpu"))
    assert shares.in_order(alone, lambda: [-item for item in alone.share(items)]) == wanted


@pytest.mark.parametrize("failing", [0, 2])
@pytest.mark.parametrize(
    "error", [InputError("shard-00000.tar", "damaged"), OSError(errno.ENOSPC, "No space left on device", "01.npy")]
)
def test_an_error_of_one_rank_is_raised_on_all(failing: int, error: Exception) -> None:
    def work(rank: ThreadRank) -> str:
        def share() -> list[int]:
            if rank.rank == failing:
                raise error
            return [rank.rank]

        with pytest.raises(type(error)) as raised:
            shares.in_order(rank, share)
        assert (raised.value is error) == (rank.rank == failing)
        return str(raised.value)

    assert on_ranks(3, work) == [str(error)] * 3


def test_only_the_main_process_shows_its_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    bars = []

    def watched(items: Iterator[int], title: str, total: int, *, visible: bool) -> Iterator[int]:
        bars.append((title, total, visible))
        return items

    monkeypatch.setattr(shares, "watched", watched)
    seen = on_ranks(3, lambda rank: list(shares.shown(rank, iter([rank.rank]), "scoring val", 7)))
    assert seen == [[0], [1], [2]]
    assert sorted(bars) == [("scoring val", 2, False), ("scoring val", 2, False), ("scoring val", 3, True)]
