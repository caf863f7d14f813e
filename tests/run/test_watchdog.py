"""What is said of other ranks is what they told, by this machine's clock; the ends of real ranks are in test_launch."""

from __future__ import annotations

import time
from dataclasses import dataclass

import pytest

from trainer.errors import InputError
from trainer.run import watchdog
from trainer.run.signals import Interrupted
from trainer.run.watchdog import SILENT_SECONDS, Hearsay, News, Watchdog


@dataclass
class Alone:
    """The processes of a plain start."""

    rank: int = 0
    world: int = 1
    host: str = "here"
    is_waiting: bool = False

    def set_patience(self, *, watched: bool) -> None: ...


def test_ranks_are_lost_when_they_failed_or_tell_nothing_new() -> None:
    hearsay = Hearsay()
    for now in (0.0, SILENT_SECONDS + 1):  # all tell twice, and rank 2 the same as before
        hearsay.hear(News(1, "a", 1, 40, int(now)), now)
        hearsay.hear(News(2, "b", 1, 39, 0), now)
        hearsay.hear(News(3, "c", 1, 38, int(now), error="ValueError: boom" if now else ""), now)
    assert hearsay.lost(SILENT_SECONDS + 1) == [
        "rank 3 on c failed after step 38: ValueError: boom",
        "rank 2 on b is silent, and last told of step 39",
    ]
    assert hearsay.lost(0.0)[1:] == [], "it is not silent before its time"
    assert (hearsay.step_of(2), hearsay.step_of(9)) == (39, None)


def test_living_ranks_that_are_less_far_are_slow() -> None:
    hearsay = Hearsay()
    hearsay.hear(News(1, "a", 2, 5, 0), 0.0)
    hearsay.hear(News(2, "b", 2, 4, 0), 0.0)
    hearsay.hear(News(3, "c", 1, 900, 0), 0.0)  # still in the training before this one
    assert hearsay.slow(2, 5, 1.0) == ["rank 2 on b is at step 4", "rank 3 on c is at step 900"]
    assert hearsay.slow(2, 5, SILENT_SECONDS + 1) == [], "these are lost"


def test_message_names_a_few_of_many_ranks() -> None:
    assert "and 92 more." in watchdog._named([f"rank {n}" for n in range(100)])
    assert "No rank is known to be behind" in watchdog._named([])


def test_training_that_marks_its_progress_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = []
    monkeypatch.setattr(Watchdog, "_end", lambda self: ended.append(self._place()))
    with Watchdog(Alone(), 1.5) as watch:
        for step in range(40):
            watch.alive(step if step < 10 else None)
            time.sleep(0.05)
        assert not ended
        while not ended:  # a bound is the test's own time
            time.sleep(0.05)
    assert ended[0] == "rank 0 of 1 on here, after step 9"


def test_a_rank_that_waits_is_left_alone_while_another_makes_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[bool] = []
    gossip, processes = Silent(), Alone(world=2, is_waiting=True)
    monkeypatch.setattr(watchdog, "Gossip", lambda _: gossip)
    monkeypatch.setattr(Watchdog, "_end", lambda _: ended.append(processes.is_waiting))
    with Watchdog(processes, 0.5):
        for _ in range(30):
            gossip.moved = time.monotonic()
            time.sleep(0.05)
        assert not ended
        processes.is_waiting = False  # from now on it is this rank that does nothing
        while not ended:
            gossip.moved = time.monotonic()
            time.sleep(0.05)
    assert ended[0] is False


def test_a_rank_ends_that_waits_while_none_makes_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[float] = []
    monkeypatch.setattr(watchdog, "Gossip", lambda _: Silent())
    monkeypatch.setattr(Watchdog, "_end", lambda _: ended.append(time.monotonic()))
    with Watchdog(Alone(world=2, is_waiting=True), 0.5):
        while not ended:
            time.sleep(0.05)


@pytest.mark.parametrize("error", [InputError("a", "b"), Interrupted(15, 3), KeyError("own")])
def test_exception_of_one_process_passes_as_it_is(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, Watchdog(Alone(), 600):
        raise error
    assert not getattr(caught.value, "__notes__", [])


class Silent:
    """In the place of the thread that talks to other ranks."""

    def __init__(self) -> None:
        self.step, self.marks, self.moved, self.confessed = 0, 0, time.monotonic(), ""

    def confess(self, error: str) -> None:
        self.confessed = error

    def listen(self) -> None: ...

    def lost(self) -> list[str]:
        return ["rank 1 on there is silent, and last told of step 4"]

    def close(self) -> None: ...


def test_exception_of_one_of_several_ranks_is_noted_and_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gossip = Silent()
    monkeypatch.setattr(watchdog, "Gossip", lambda _: gossip)
    with pytest.raises(ValueError, match="boom") as own, Watchdog(Alone(world=2), 600) as watch:
        watch.alive(5)
        raise ValueError("boom")
    assert own.value.__notes__ == ["rank 0 of 2 on here, after step 5"]
    assert gossip.confessed == "ValueError: boom" and gossip.step == 5 and not capsys.readouterr().err

    with pytest.raises(RuntimeError) as others, Watchdog(Alone(world=2), 600) as watch:
        watch.alive(6)
        raise RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer")
    note = "rank 0 of 2 on here, after step 6. Behind: rank 1 on there is silent, and last told of step 4."
    assert others.value.__notes__ == [note]
    assert capsys.readouterr().err.startswith(f"{note} (RuntimeError: [gloo")
