"""Where the ranks of a job meet: the first host of its allocation, and a port that follows from the number of the job.

The batch script runs on that host, so it can see whether the port is free; the ranks are told by MASTER_ADDR and
MASTER_PORT, and people (or a program of another kind) by RUN/slurm/JOB/meeting.json. No torch: this runs in a moment.
"""

from __future__ import annotations

import errno
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from trainer.cluster.records import Place, folder_of
from trainer.errors import InputError
from trainer.run.files import write_json
from trainer.run.launch import first_host, master_port

PORTS = range(10_000, 30_000)
"""Those of `master_port`."""
TRIED = 200
"""How many ports are looked at before it is said that something else is wrong."""
ASK_SECONDS = 30


@dataclass(frozen=True)
class Meeting:
    """An address and a port, and which start of the job chose them."""

    address: str
    port: int
    restart: int = 0


def meet(run: Path, place: Place, environment: Mapping[str, str]) -> Meeting | None:
    """Choose and publish where the ranks of a job meet; None where SLURM does not say which nodes it has.

    MASTER_ADDR and MASTER_PORT that are set already, by the site or the user, are kept.
    """
    nodes = environment.get("SLURM_JOB_NODELIST", "")
    if not nodes:
        return None
    first = master_port(int(environment["SLURM_JOB_ID"]), 0)
    given = environment.get("MASTER_PORT")
    meeting = Meeting(
        environment.get("MASTER_ADDR") or address_of(first_host(nodes)),
        int(given) if given else free_port(first),
        place.restart,
    )
    write_json(folder_of(run, place.job) / "meeting.json", asdict(meeting))
    return meeting


def address_of(host: str) -> str:
    """The host where its name has an address, else what SLURM reaches it by.

    Raises:
        InputError: neither is known.
    """
    try:
        socket.getaddrinfo(host, None)
        return host
    except OSError:
        pass
    told = node_address(_ask("scontrol", "show", "node", "-o", host))
    if told is None:
        raise InputError(
            "MASTER_ADDR",
            f"the first host of the job, {host}, has no address on {socket.gethostname()}, and scontrol gives no "
            "NodeAddr",
            fix="Set MASTER_ADDR in the `setup` lines, to an address of that host.",
        )
    return told


def node_address(told: str) -> str | None:
    """NodeAddr in what `scontrol show node -o` says."""
    found = re.search(r"\bNodeAddr=(\S+)", told)
    return found[1] if found else None


def free_port(first: int, is_free: Callable[[int], bool] | None = None) -> int:
    """The first free port from `first` on, within those that no client is given.

    Raises:
        InputError: none of the next ones is free.
    """
    is_free = is_free or _is_free
    for offset in range(TRIED):
        port = PORTS[(first - PORTS.start + offset) % len(PORTS)]
        if is_free(port):
            if offset:
                print(f"port {first} is taken; the ranks meet at port {port}", file=sys.stderr)
            return port
    raise InputError(
        "MASTER_PORT", f"{TRIED} ports from {first} on are taken on {socket.gethostname()}", fix="Set MASTER_PORT."
    )


def _is_free(port: int) -> bool:
    """Whether a server can listen there, as the store of torch does: on all addresses."""
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        socket.create_server(("", port), family=family, dualstack_ipv6=both).close()
    except OSError as error:
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            return False
        raise
    return True


def _ask(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=ASK_SECONDS).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
