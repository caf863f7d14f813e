"""Paths of a configuration: `~`, `$VAR` and `${VAR}` in them, and which of them are URLs.

A path is expanded as its file is read, and a run directory keeps the result: its jobs may run where the variables
differ. `$$` stands for a dollar sign.
"""

from __future__ import annotations

import os
import re
from typing import Annotated

from pydantic import AfterValidator, PlainSerializer

_VARIABLE = re.compile(r"\$(?:(?P<dollar>\$)|(?P<plain>[A-Za-z_]\w*)|\{(?P<braced>[^}]*)\}?)", re.ASCII)


def is_remote(shards: str) -> bool:
    """Whether data.shards is a URL and not a folder."""
    return re.match(r"[a-z][a-z0-9+.-]*:", shards) is not None


def expanded(path: str) -> str:
    """A path with its home folder and variables put in; a URL as it is (the shell of a `pipe:` has its own variables).

    Raises:
        ValueError: a variable is not set or empty, or there is no such user.
    """
    if is_remote(path):
        return path
    whole = _VARIABLE.sub(lambda match: _value(match, path), path)
    home = os.path.expanduser(whole)  # noqa: PTH111 (Path.expanduser ends with a RuntimeError that names no path)
    if home.startswith("~"):
        raise ValueError(f"found {path}, expected ~ or ~NAME of a user of this machine (./~ for a file of that name)")
    return home


def _value(match: re.Match[str], path: str) -> str:
    if match["dollar"]:
        return "$"
    name = match["plain"] or match["braced"]
    if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII) or (match["braced"] and not match[0].endswith("}")):
        raise ValueError(
            f"found {match[0]} in {path}, expected a variable as $NAME or ${{NAME}} ($$ for a dollar sign)"
        )
    if not os.environ.get(name):
        raise ValueError(f"found {match[0]} in {path}, expected a variable that is set ($$ for a dollar sign)")
    return os.environ[name]


def _escaped(path: str) -> str:
    """A path that `expanded` turns into this one."""
    return path if is_remote(path) else path.replace("$", "$$")


def _not_empty(path: str) -> str:
    if not path.strip():
        raise ValueError(f"found {path!r}, expected a path")
    return path


PathText = Annotated[
    str, AfterValidator(_not_empty), AfterValidator(expanded), PlainSerializer(_escaped, when_used="json")
]
"""A path or a URL, expanded; written back, it is read as the same path."""
