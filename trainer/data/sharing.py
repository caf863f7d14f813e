"""Memory that the processes of one user on one node share: filled by the first, got by the others.

It is a sealed, anonymous file; who has it hands it to others through an abstract socket, whose name is made of what is
in it. Nothing is written to any file system, so no crash leaves anything behind, and the small /dev/shm of a container
is no limit. Who is stopped (a suspended job) answers nobody: the others pass it over, to another memory of their own,
whose name follows from the first one's and the process, so that they share that.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import platform
import socket
import struct
import threading
import time
import weakref
from pathlib import Path
from typing import Protocol

import numpy as np

from trainer.errors import InputError
from trainer.progress import say

PATIENCE_S = 600.0
"""How long a process waits for another one of its node to fill the memory."""
ANSWER_S = 5.0
"""After how long a wait is said, and one who is stopped is waited for no more."""


class Filler(Protocol):
    """Writes the content into (size,) uint8."""

    def __call__(self, memory: np.ndarray) -> None:
        """Write everything."""


class SharedMemory:
    """Read-only memory of a name that stands for its content. Workers get it by fork.

    Attributes:
        array: (size,) uint8.
        filled_here: whether this process was the first.

    Raises:
        InputError: the process that fills it does not come to an end.
    """

    def __init__(self, name: str, size: int, fill: Filler) -> None:
        file, listener = None, None
        while file is None:
            listener = _bind(_address(name))
            if listener is not None:
                file = _fill(listener, size, fill)
            else:
                file, name = _wait(name)
        self.filled_here = listener is not None
        self.array = np.frombuffer(mmap.mmap(file, size, prot=mmap.PROT_READ), np.uint8)
        if listener is None:
            os.close(file)
        else:
            os.register_at_fork(after_in_child=listener.close)  # a worker must not keep the name alive
            threading.Thread(target=_serve, args=(listener, file), daemon=True).start()
            weakref.finalize(self, _stop, listener)


def is_shared(name: str) -> bool:
    """Whether a process of this node has the memory of that name, or fills it, and will hand it out."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(ANSWER_S)
        if connection.connect_ex(_address(name)) != 0:
            return False
        owner, _ = _peer(connection)
    return is_shared(_name_without(name, owner)) if _is_stopped(owner) else True


def _address(name: str) -> str:
    return f"\0fmri-flow-{os.getuid()}-{name}"


def _bind(address: str) -> socket.socket | None:
    """A listening socket; None where another process listens there already."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(address)
        listener.listen(256)
    except OSError:
        listener.close()
        return None
    return listener


def _fill(listener: socket.socket, size: int, fill: Filler) -> int:
    """A sealed anonymous file with the content."""
    try:
        file = os.memfd_create("fmri-flow", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(file, size)
        memory = mmap.mmap(file, size)
        fill(np.frombuffer(memory, np.uint8))
        memory.close()  # only what nobody can write to may be sealed
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, seals)
    except BaseException:
        listener.close()  # whoever waits tries for itself
        raise
    return file


def _serve(listener: socket.socket, file: int) -> None:
    """Hand the file to every process of this user that asks, until the listener is stopped."""
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            os.close(file)
            return
        with connection, contextlib.suppress(OSError):
            if _peer(connection)[1] == os.getuid():
                socket.send_fds(connection, [b"x"], [file])


def _stop(listener: socket.socket) -> None:
    with contextlib.suppress(OSError):
        listener.shutdown(socket.SHUT_RDWR)
    listener.close()


def _wait(name: str) -> tuple[int | None, str]:
    """The file of the process that has a name; None where it has ended, or is stopped; and the name to go on with."""
    begun, told = time.monotonic(), False
    while True:
        try:
            file, owner = _ask(_address(name))
        except ConnectionRefusedError:  # it has ended, or does not listen yet
            time.sleep(0.05)
            return None, name
        waited = time.monotonic() - begun
        if file is not None:
            return file, name
        process = f"process {owner} on {platform.node()}" if owner else "a process of this node"
        if waited >= ANSWER_S and _is_stopped(owner):
            say(f"data.residence: {process}, which has the same data in memory, is stopped: they are copied once more")
            return None, _name_without(name, owner)
        if waited >= PATIENCE_S:
            raise InputError(
                "data.residence",
                f"{process}, which copies the data into shared memory, has not finished in {PATIENCE_S:.0f} s",
                fix="Use data.residence: disk, or see what that process does.",
            )
        if waited >= ANSWER_S and not told:
            say(f"data.residence: waiting for {process}, which copies the same data into memory that both will read")
            told = True


def _ask(address: str) -> tuple[int | None, int]:
    """The file of the process that listens, None where it does not answer within `ANSWER_S`; and its number.

    The number is 0 where it cannot be told. Raises ConnectionRefusedError where nobody listens.
    """
    owner, files = 0, []
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(min(ANSWER_S, PATIENCE_S))
        try:
            connection.connect(address)
            owner, user = _peer(connection)
            files = socket.recv_fds(connection, 1, 1)[1] if user == os.getuid() else []
        except TimeoutError:
            return None, owner
        except ConnectionRefusedError:
            raise
        except OSError:
            pass
    if not files:
        time.sleep(0.05)
    return (files[0] if files else None), owner


def _name_without(name: str, owner: int) -> str:
    """The name of what those share who pass over the stopped owner of a name."""
    return f"{name}.{owner}"


def _is_stopped(process: int) -> bool:
    """Whether a process of this node is stopped, by a signal or a debugger."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):  # it has ended, or cannot be seen from here
        return False
    return state in ("T", "t")


def _peer(connection: socket.socket) -> tuple[int, int]:
    """The process at the other end, and its user."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    process, user, _ = struct.unpack("3i", credentials)
    return int(process), int(user)
