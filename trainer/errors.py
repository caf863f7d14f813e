"""The one error that means "what you gave is wrong", and how a command ends on it.

A mistake in the input (a config key, a file, a width) is an `InputError`: one line that says where, what was found,
what would be right and what to do; the command prints it and leaves with status 2. Every other exception is our
mistake and keeps its traceback.
"""

from __future__ import annotations

import errno
import functools
import sys
from collections.abc import Callable
from os import PathLike


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
    """Wrap a command's `main`: an `InputError` or a full disk becomes one line on stderr and exit status 2."""

    @functools.wraps(main)
    def wrapped(*args: object, **kwargs: object) -> int:
        try:
            return main(*args, **kwargs)
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            where = f"{error.filename}: " if error.filename else ""
            print(f"error: {where}{error.strerror}. Make room and run the command again.", file=sys.stderr)
            return 2

    return wrapped
