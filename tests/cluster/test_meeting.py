"""Where ranks meet: the first host or its address in SLURM, and the port of the job or the next free one."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given

from trainer.cluster import meeting
from trainer.cluster.meeting import PORTS, TRIED, Meeting, address_of, free_port, meet, node_address
from trainer.cluster.records import Place
from trainer.errors import InputError
from trainer.run.launch import master_port


@given(st.integers(0, 10**8), st.sets(st.integers(0, TRIED - 2)))
def test_the_port_is_that_of_the_job_or_the_next_free_one(job: int, taken: set[int]) -> None:
    first = master_port(job, 0)
    ring = [PORTS[(first - PORTS.start + offset) % len(PORTS)] for offset in range(TRIED)]
    closed = {ring[offset] for offset in taken}
    assert free_port(first, lambda port: port not in closed) == next(port for port in ring if port not in closed)


def test_a_port_that_a_server_has_is_taken_and_one_that_it_had_is_free() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)):
            pass
        assert not meeting._is_free(port)
    assert meeting._is_free(port)


def test_where_all_ports_are_taken_it_says_so() -> None:
    with pytest.raises(InputError, match=r"MASTER_PORT: 200 ports from 10000 on are taken .* Set MASTER_PORT"):
        free_port(10_000, lambda port: False)


def test_a_host_whose_name_has_no_address_is_reached_as_slurm_does(monkeypatch: pytest.MonkeyPatch) -> None:
    told = "NodeName=n1 Arch=x86_64 CoresPerSocket=1 NodeAddr=10.0.0.7 NodeHostName=n1 Version=22.05.8"
    monkeypatch.setattr(meeting, "_ask", lambda *command: told if command[-1] == "nowhere.invalid" else "")
    assert address_of("localhost") == "localhost"
    assert address_of("nowhere.invalid") == "10.0.0.7"
    with pytest.raises(InputError, match=r"MASTER_ADDR: the first host of the job, other.invalid, has no address"):
        address_of("other.invalid")
    assert node_address("") is None


def test_the_meeting_is_published_and_what_a_site_has_set_is_kept(tmp_path: Path) -> None:
    environment = {"SLURM_JOB_ID": "12", "SLURM_JOB_NODELIST": "localhost"}
    place = Place("12", restart=2)
    met = meet(tmp_path, place, environment)
    assert met is not None and met.address == "localhost" and met.port in PORTS
    published = json.loads((tmp_path / "slurm" / "12" / "meeting.json").read_text())
    assert published == {"address": "localhost", "port": met.port, "restart": 2}
    given = environment | {"MASTER_ADDR": "ib7", "MASTER_PORT": "4711"}
    assert meet(tmp_path, place, given) == Meeting("ib7", 4711, 2)
    assert meet(tmp_path, place, {"SLURM_JOB_ID": "12"}) is None
