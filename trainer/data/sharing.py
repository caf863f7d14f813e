"""Memory that the processes of one user on one node share: filled by the first, got by the others.

It is a sealed, anonymous file; who has it hands it to others through an abstract socket, whose name is made of what is
in it. Nothing is written to any file system, so no crash leaves anything behind, and the small /dev/shm of a container
is no limit.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import socket
import struct
import threading
import time
import weakref
from typing import Protocol

import numpy as np

from trainer.errors import InputError

PATIENCE_S = 600.0
"""How long a process waits for another one of its node to fill the memory."""


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
        address = _address(name)
        deadline = time.monotonic() + PATIENCE_S
        file, listener = None, None
        while file is None:
            listener = _bind(address)
            file = _ask(address, deadline) if listener is None else _fill(listener, size, fill)
        self.filled_here = listener is not None
        self.array = np.frombuffer(mmap.mmap(file, size, prot=mmap.PROT_READ), np.uint8)
        if listener is None:
            os.close(file)
        else:
            os.register_at_fork(after_in_child=listener.close)  # a worker must not keep the name alive
            threading.Thread(target=_serve, args=(listener, file), daemon=True).start()
            weakref.finalize(self, _stop, listener)


def is_shared(name: str) -> bool:
    """Whether a process of this node has the memory of that name, or fills it."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(5.0)
        return connection.connect_ex(_address(name)) == 0


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
            if _peer(connection) == os.getuid():
                socket.send_fds(connection, [b"x"], [file])


def _stop(listener: socket.socket) -> None:
    with contextlib.suppress(OSError):
        listener.shutdown(socket.SHUT_RDWR)
    listener.close()


def _ask(address: str, deadline: float) -> int | None:
    """The file of the process that listens; None where there is no answer yet, or never will be."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise InputError(
            "data.residence",
            f"the process of this node that copies the data has not finished in {PATIENCE_S:.0f} s",
            fix="Use data.residence: disk, or see what that process does.",
        )
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(min(left, 5.0))
        try:
            connection.connect(address)
            files = socket.recv_fds(connection, 1, 1)[1] if _peer(connection) == os.getuid() else []
        except OSError:
            files = []
    if not files:
        time.sleep(min(0.05, left))
    return files[0] if files else None


def _peer(connection: socket.socket) -> int:
    """The user of the process at the other end."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", credentials)[1])
