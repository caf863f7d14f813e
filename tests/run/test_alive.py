"""A process is seen to live or to be dead on its own machine, and told by its counter from another."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import hypothesis.strategies as st
from hypothesis import given

from trainer.run.alive import CounterWatch, Owner


def test_this_process_lives_and_a_number_used_again_is_another_process() -> None:
    this = Owner.this()
    assert (this.pid, this.lives()) == (os.getpid(), True)
    assert this.born is not None
    assert replace(this, born=this.born - 1).lives() is False


def test_a_process_of_another_machine_cannot_be_seen_even_under_the_same_name() -> None:
    assert replace(Owner.this(), machine="another boot of it, or a container").lives() is None
    assert Owner.read({"host": "node7", "pid": 12}).lives() is None


def test_a_killed_process_is_dead_before_its_parent_buries_it() -> None:
    process = subprocess.Popen([sys.executable, "-c", "print(flush=True); input()"], stdin=-1, stdout=-1)
    assert process.stdout is not None
    process.stdout.readline()
    owner = _owner_of(process.pid)
    assert owner.lives() is True
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and stays a zombie
    assert owner.lives() is False
    process.communicate()
    assert owner.lives() is False


def _owner_of(pid: int) -> Owner:
    from trainer.run import alive

    status = alive._status(pid)
    assert status is not None
    return replace(Owner.this(), pid=pid, born=status[1])


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 12)), min_size=1, max_size=12))
def test_a_counter_is_judged_by_when_it_last_changed_here(sights: list[tuple[int, int]]) -> None:
    watch, now, history = CounterWatch(10.0), 0, []
    for value, waited in sights:
        now += waited
        history.append((now, value))
        found = watch.saw(value, now)
        changes = [t for (t, v), (_, before) in zip(history[1:], history, strict=False) if v != before]
        stood_still = now - (changes[-1] if changes else history[0][0])
        assert found is (False if stood_still >= 10 else True if changes else None)
