"""Long work tells those who listen that it goes on."""

from __future__ import annotations

from trainer.progress import listening, watched


def test_listeners_hear_of_every_piece_of_watched_work_while_they_listen() -> None:
    heard: list[int] = []
    items = iter(watched(range(4), "work", 4, visible=False))
    with listening(lambda: heard.append(len(heard))):
        assert [next(items), next(items), next(items)] == [0, 1, 2]
    assert next(items) == 3
    assert heard == [0, 1]
