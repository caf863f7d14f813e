"""A file system without hard links, for a test and for the processes that it starts."""

from __future__ import annotations

import errno
import os

NO_LINKS = "from tests.links import refuse; import os; os.link = refuse\n"
"""Put before the code of a process."""


def refuse(*_: object, **__: object) -> None:
    """`os.link` on exFAT."""
    raise OSError(errno.EPERM, os.strerror(errno.EPERM))
