"""A piece of work is done by one process at a time: claims are made, kept alive, taken over from the dead, released."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from unittest.mock import patch

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from tests.links import NO_LINKS, refuse
from tests.permissions import bound_by_modes
from tests.pipes import line, tell
from trainer.errors import InputError
from trainer.run import claims
from trainer.run.alive import Owner
from trainer.run.claims import Claim, ClaimLost, Claims
from trainer.run.files import write_json

NAME = "step_00000500-val"
CLAIM = """
import sys
from pathlib import Path
from trainer.run.claims import Claims
mine = Claims(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
claim = mine.take(sys.argv[2])
print("none" if claim is None else "taken", flush=True)
sys.stdin.readline()
"""
Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "BEAT_EVERY_S", 0.02)
    monkeypatch.setattr(claims, "STALE_AFTER_S", 0.5)


@pytest.fixture
def process(tmp_path: Path) -> Iterator[Start]:
    """Starts processes that try to claim as soon as they are given a line."""
    processes = []

    def start(links: bool = True) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", CLAIM if links else NO_LINKS + CLAIM, str(tmp_path), NAME]
        processes.append(subprocess.Popen(command, stdin=-1, stdout=-1, text=True))
        assert line(processes[-1]) == "ready"
        return processes[-1]

    yield start
    for each in processes:
        each.kill()
        each.communicate()


def elsewhere(folder: Path, number: int, count: int = 0) -> None:
    """A claim of a process on another host, whose clock is an hour ahead."""
    path = folder / f"{NAME}.{number}.json"
    write_json(path, {"host": "node7", "pid": 12, "machine": "another", "born": 1, "count": count})
    os.utime(path, (time.time() + 3600,) * 2)


def a_dead_owner() -> dict[str, object]:
    """A process of this machine whose number is another's now."""
    this = Owner.this()
    assert this.born is not None
    return asdict(replace(this, born=this.born - 1))


def taken(mine: Claims) -> Claim:
    claim = mine.take(NAME)
    assert claim is not None
    return claim


def taken_in_time(mine: Claims) -> Claim:
    for _ in range(500):
        claim = mine.take(NAME)
        if claim is not None:
            return claim
        time.sleep(0.02)
    raise AssertionError("it was never taken over")


def until(condition: Callable[[], bool]) -> None:
    for _ in range(500):
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError("it never happened")


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_claim_is_one_processs_until_it_is_released(tmp_path: Path) -> None:
    mine, other = Claims(tmp_path / "claims"), Claims(tmp_path / "claims")
    with taken(mine) as claim:
        assert other.take(NAME) is None and mine.take(NAME) is None
        assert other.names() == {NAME}
        with other.take("step_00000500-test") or pytest.fail("another piece of work is free"):
            assert other.names() == {NAME, "step_00000500-test"}
        claim.check()
    assert files(tmp_path / "claims") == []
    taken(other).release()


@pytest.mark.parametrize("links", [4, 2, 0], ids=["hard links", "hard links for half of them", "no hard links"])
@pytest.mark.parametrize("dead", [0, 7], ids=["free", "the seventh owner is dead"])
def test_of_those_that_try_at_once_one_claims(tmp_path: Path, process: Start, dead: int, links: int) -> None:
    if dead:
        write_json(tmp_path / f"{NAME}.{dead}.json", {**a_dead_owner(), "count": 3})
    processes = [process(links=i < links) for i in range(4)]
    for each in processes:
        tell(each)
    assert sorted(line(each) for each in processes) == ["none", "none", "none", "taken"]
    assert f"{NAME}.{dead + 1}.json" in files(tmp_path) and f"{NAME}.{dead + 2}.json" not in files(tmp_path)


def test_the_claim_of_a_killed_process_is_taken_over_at_once(tmp_path: Path, process: Start) -> None:
    first = process()
    tell(first)
    assert line(first) == "taken"
    mine = Claims(tmp_path)
    assert mine.take(NAME) is None
    first.kill()
    os.waitid(os.P_PID, first.pid, os.WEXITED | os.WNOWAIT)  # a zombie, too, is dead
    (tmp_path / f".{NAME}.1.json.{first.pid}").write_text("{")  # killed while it wrote
    with taken(mine):
        assert files(tmp_path) == [f"{NAME}.2.json"]


def test_a_claim_on_another_host_holds_while_its_counter_advances(tmp_path: Path) -> None:
    mine = Claims(tmp_path)
    for count in range(10):  # for twice as long as it may stand still
        elsewhere(tmp_path, 1, count)
        assert mine.take(NAME) is None
        time.sleep(0.1)
    elsewhere(tmp_path, 1, 10)
    assert mine.take(NAME) is None
    seen = time.monotonic()
    with taken_in_time(mine):
        assert time.monotonic() - seen >= 0.4
        assert json.loads((tmp_path / f"{NAME}.2.json").read_text())["host"] == Owner.this().host


def test_a_claim_that_is_no_json_is_dead_when_it_stays_so(tmp_path: Path) -> None:
    (tmp_path / f"{NAME}.3.json").write_text('{"host"')
    mine = Claims(tmp_path)
    assert mine.take(NAME) is None
    with taken_in_time(mine):
        assert files(tmp_path) == [f"{NAME}.4.json"]


def test_a_claim_that_is_being_made_is_not_taken_from_its_slow_maker(tmp_path: Path) -> None:
    """Without hard links a claim is there before its text is."""
    path = tmp_path / f"{NAME}.1.json"
    path.touch()
    mine = Claims(tmp_path)
    assert mine.take(NAME) is None
    elsewhere(tmp_path, 1)
    for count in range(10):
        assert mine.take(NAME) is None
        elsewhere(tmp_path, 1, count)
        time.sleep(0.1)
    assert files(tmp_path) == [path.name]


def test_a_maker_that_was_taken_for_dead_before_it_had_written_has_lost_its_claim(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It slept between the two steps by which a claim is made without hard links."""
    monkeypatch.setattr(os, "link", refuse)
    flush = os.fsync

    def overtaken(descriptor: int) -> None:
        if (tmp_path / f"{NAME}.1.json").exists():
            (tmp_path / f"{NAME}.1.json").unlink()
            elsewhere(tmp_path, 2)
            monkeypatch.setattr(os, "fsync", flush)
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", overtaken)
    claim = taken(Claims(tmp_path))
    with claim, pytest.raises(ClaimLost):
        claim.check()
    assert files(tmp_path) == [f"{NAME}.2.json"]
    assert json.loads((tmp_path / f"{NAME}.2.json").read_text())["host"] == "node7"


def test_a_folder_of_claims_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    with bound_by_modes(), pytest.raises(InputError, match=f"^{tmp_path}: cannot be written: Permission denied. Who"):
        Claims(tmp_path).take(NAME)


def test_an_owner_that_was_taken_for_dead_learns_it_and_leaves_the_next_ones_claim_alone(tmp_path: Path) -> None:
    with taken(Claims(tmp_path)) as claim:
        elsewhere(tmp_path, 2)
        with pytest.raises(ClaimLost, match="another process has taken this work over"):
            claim.check()
        until(lambda: claim.lost)
        before = (tmp_path / f"{NAME}.2.json").read_text()
    assert (tmp_path / f"{NAME}.2.json").read_text() == before


@pytest.mark.parametrize("again", [True, False])
def test_an_owner_whose_folder_was_deleted_has_lost_its_claim(tmp_path: Path, again: bool) -> None:
    folder = tmp_path / "claims"
    with taken(Claims(folder)) as claim:
        folder.rename(tmp_path / "deleted")
        if again:
            elsewhere(folder, 1)
        until(lambda: claim.lost)
        with pytest.raises(ClaimLost):
            claim.check()
    assert folder.exists() == again
    if again:
        assert json.loads((folder / f"{NAME}.1.json").read_text())["host"] == "node7"


def test_a_claim_beats_while_its_owner_works(tmp_path: Path) -> None:
    with taken(Claims(tmp_path)):
        path = tmp_path / f"{NAME}.1.json"
        first = json.loads(path.read_text())["count"]
        until(lambda: json.loads(path.read_text())["count"] > first + 2)
        assert Owner.read(json.loads(path.read_text())) == Owner.this()


def test_a_full_disk_is_said_once_and_the_work_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        tried.append(1)
        raise OSError(28, "No space left on device")

    tried: list[int] = []
    monkeypatch.setattr(claims, "write_json", full)
    with taken(Claims(tmp_path)) as claim:
        until(lambda: len(tried) > 3)
        claim.check()
    assert capsys.readouterr().err.count(f"{NAME}.1.json cannot be written: [Errno 28] No space left") == 1


class Host:
    """A worker in a world where all claims are files of one folder: it may die, and its claims with it."""

    def __init__(self, folder: Path, number: int) -> None:
        self.claims, self.number = Claims(folder), number
        self.held: dict[str, Claim] = {}


@given(
    st.lists(st.tuples(st.integers(0, 2), st.sampled_from("abc"), st.sampled_from(["take", "release", "die"]))),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_whatever_workers_do_a_piece_of_work_has_one_living_owner(
    events: list[tuple[int, str, str]], links: bool
) -> None:
    with nullcontext() if links else patch.object(os, "link", refuse):
        work(events)


def work(events: list[tuple[int, str, str]]) -> None:
    folder = Path(tempfile.mkdtemp())
    hosts = [Host(folder, number) for number in range(3)]
    owners: dict[str, Host] = {}
    orphans: set[str] = set()
    for number, name, what in events:
        host = hosts[number]
        if what == "take":
            claim = host.claims.take(name)
            assert (claim is None) == (name in owners), "free or dead work is taken at once, that of the living never"
            if claim is not None:
                host.held[name], owners[name] = claim, host
                orphans.discard(name)
        elif what == "release" and name in host.held:
            host.held.pop(name).release()
            del owners[name]
        elif what == "die":
            for piece, claim in host.held.items():
                claim._pulse.stop()
                write_json(claim._path, {**a_dead_owner(), "count": 9})
                del owners[piece]
                orphans.add(piece)
            hosts[number] = Host(folder, number)
    for host in hosts:
        for claim in host.held.values():
            claim.check()
            claim.release()
    assert Claims(folder).names() == orphans, "only the dead leave claims"
    shutil.rmtree(folder)
