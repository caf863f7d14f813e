"""Long work shows itself, and tells those who listen that it goes on."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator

import pytest

from trainer import progress
from trainer.progress import alive, listening, unbroken, watched


class Clock:
    """Time as the test says."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    monkeypatch.setattr(progress, "_display", progress._Display())
    yield clock


def test_listeners_hear_of_every_piece_of_watched_work_while_they_listen() -> None:
    heard: list[int] = []
    items = iter(watched(range(4), "work", 4, visible=False))
    with listening(lambda: heard.append(len(heard))):
        assert [next(items), next(items), next(items)] == [0, 1, 2]
    assert next(items) == 3
    assert heard == [0, 1]


def test_listeners_hear_from_inside_of_a_piece() -> None:
    heard: list[int] = []
    with listening(lambda: heard.append(0)):
        alive()
    alive()
    assert heard == [0]


def test_a_log_gets_a_line_about_every_20_seconds(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in watched(range(3), "sampling val", 3):
        for _ in watched(range(8), "subjects", 8):
            clock.now += 4
            alive()
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "sampling val 0/3, subjects 4/8 (00:20)",
        "sampling val 1/3, subjects 1/8 (00:40)",
        "sampling val 1/3, subjects 6/8 (01:00)",
        "sampling val 2/3, subjects 3/8 (01:20)",
    ]


def test_short_work_gives_no_line_and_many_short_loops_do(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in watched(range(3), "short", 3):
        clock.now += 5
    assert not capsys.readouterr().err
    for name in ("a", "b"):
        for _ in watched(range(2), name, 2):
            clock.now += 4
    assert capsys.readouterr().err == "a 2/2 (00:08)\n"
    clock.now += 3600  # a training, which has lines of its own
    for _ in watched(range(2), "later", 2):
        clock.now += 4
    assert not capsys.readouterr().err


def test_other_ranks_are_silent(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in watched(range(3), "scoring", 3, visible=False):
        clock.now += 100
        alive()
    assert not capsys.readouterr().err


def test_a_terminal_gets_bars(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    for _ in watched(range(2), "scoring", 2):
        clock.now += 100
        alive()
    assert "scoring:   0%" in capsys.readouterr().err


def test_a_loop_that_is_left_is_shown_no_longer(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="boom"):
        for _ in watched(range(2), "lost", 2):
            raise ValueError("boom")
    for _ in watched(range(2), "next", 2):
        clock.now += 30
    assert "lost" not in capsys.readouterr().err


def test_a_call_that_cannot_speak_is_spoken_for_until_its_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "CALL_EVERY_S", 0.01)
    heard: list[float] = []
    with listening(lambda: heard.append(time.monotonic())):
        with unbroken(60):
            while len(heard) < 3:
                time.sleep(0.01)
        before = len(heard)
        with unbroken(-1):
            time.sleep(0.1)
        assert len(heard) == before


def test_what_a_listener_raises_meanwhile_is_raised_after_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "CALL_EVERY_S", 0.01)
    heard: list[int] = []

    def stop() -> None:
        heard.append(0)
        raise InterruptedError("SIGTERM")

    with listening(stop), pytest.raises(InterruptedError, match="SIGTERM"), unbroken(60):
        while not heard:
            time.sleep(0.01)
        time.sleep(0.05)
    assert heard == [0]
