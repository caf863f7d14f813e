"""The world that torch sees is the one announced, and a signal becomes a wish read at a step boundary."""

from __future__ import annotations

import os
import signal

import pytest

from trainer.errors import InputError
from trainer.run.processes import Interrupted, StopRequest, make_accelerator


def test_a_single_process_is_its_own_world() -> None:
    accelerator = make_accelerator("no")
    assert (accelerator.num_processes, accelerator.is_main_process) == (1, True)


def test_ranks_that_do_not_see_each_other_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    make_accelerator("no")  # the state of this process is made: one process
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="found a world of 1, expected the 2 that the launcher announced"):
        make_accelerator("no")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_noted_and_a_second_one_ends_at_once(number: signal.Signals) -> None:
    before = signal.signal(number, signal.default_int_handler)
    try:
        with StopRequest() as stop:
            assert not stop.requested
            os.kill(os.getpid(), number)
            assert stop.requested
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), number)
            with pytest.raises(Interrupted, match=f"{number.name} at step 7") as caught:
                stop.leave(7)
            assert caught.value.signum == number
    finally:
        signal.signal(number, before)
