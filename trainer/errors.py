"""The one error that means "what you gave is wrong", and how a command ends on it.

A mistake in the input (a config key, a file, a width) is an `InputError`: one line that says where, what was found,
what would be right and what to do; the command prints it and leaves with status 2.

So does an OSError about a file that is the user's to mend: one that the file system refuses to open, make or fill (no
permission, no room, a name too long, a file where a folder is wanted), and one that is missing, or in the way, among
what the command line names. Every other exception is our mistake and keeps its traceback.
"""

from __future__ import annotations

import errno
import functools
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from os import PathLike
from pathlib import Path

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
REFUSALS = frozenset(
    {
        *(errno.EACCES, errno.EPERM, errno.EROFS, *_NO_ROOM, errno.EFBIG),
        *(errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.ENXIO, errno.EINVAL, errno.EILSEQ),
        *(errno.EIO, errno.EREMOTEIO, errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.ENOTCONN, errno.ENODEV),
        *(errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK, errno.EXDEV, errno.EMLINK, errno.EBUSY, errno.ETXTBSY),
    }
)
"""What a file system says when the program asked for something sensible: it is set up so, it is full, or it fails."""


class InputError(Exception):
    """A mistake in what the user gave.

    The message reads `WHERE: WHAT: found X, expected Y. FIX`, on one line.

    Args:
        where: the file, or the config key, that is wrong.
        what: the problem in a few words.
        found: what stands there now.
        expected: what would be right.
        fix: a sentence that says what to do.
    """

    def __init__(
        self,
        where: str | PathLike[str],
        what: str,
        *,
        found: object = None,
        expected: object = None,
        fix: str | None = None,
    ) -> None:
        comparison = ", ".join(
            f"{word} {value}" for word, value in (("found", found), ("expected", expected)) if value is not None
        )
        message = ": ".join(part for part in (str(where), what, comparison) if part)
        if fix:
            message = f"{message.rstrip('.')}. {fix}"
        super().__init__(" ".join(message.split()))

    def __reduce__(self) -> tuple[object, ...]:
        # an error of a data worker reaches the training through pickle, as its finished message
        return InputError, (str(self), "")


def exit_on_input_error(main: Callable[..., int]) -> Callable[..., int]:
    """Wrap a command's `main(argv)`: an error that is the user's to mend becomes one line on stderr and status 2.

    So does Ctrl-C where the command has not its own way to end, with the status that shells give it.
    """

    @functools.wraps(main)
    def wrapped(*args: object, **kwargs: object) -> int:
        try:
            return main(*args, **kwargs)
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
        except OSError as error:
            words = args[0] if args and isinstance(args[0], Sequence) else sys.argv[1:]
            line = file_error(error, [str(word) for word in words])
            if line is None:
                raise
            print(f"error: {line}", file=sys.stderr)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 128 + signal.SIGINT
        return 2

    return wrapped


def file_error(error: OSError, words: Sequence[str]) -> str | None:
    """The line about a file that is the user's to mend; None where the error is none of those.

    Args:
        words: of the command line.
    """
    fix = ". Make room and run the command again." if error.errno in _NO_ROOM else ""
    if not isinstance(error.filename, str | bytes | PathLike):
        return f"{error.strerror}{fix}" if fix else None
    path = os.fsdecode(error.filename)
    real = Path(os.path.realpath(path))
    if error.errno not in REFUSALS and not any(real.is_relative_to(named) for named in _named(words)):
        return None
    return " ".join(f"{path}: {error.strerror}{fix}".split())


def _named(words: Sequence[str]) -> Iterator[Path]:
    """What the words of a command line name where they are paths, alone or behind `=`."""
    for word in words:
        yield from (Path(os.path.realpath(text)) for text in {word, word.partition("=")[2]} - {""})
