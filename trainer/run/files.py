"""Small files that appear whole: a reader sees all of one, or the one before it."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer.errors import InputError
from trainer.text import decoded


def write_whole(path: Path, text: str) -> None:
    """Write a text file so that a reader sees all of it or the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        _write_synced(aside, text)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def write_new(path: Path, text: str) -> bool:
    """Write a text file that nobody else may have made; False where it is there already.

    A hard link decides: of several processes, on any hosts that share the file system, exactly one makes the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}")
    try:
        _write_synced(aside, text)
        try:
            os.link(aside, path)
        except FileExistsError:
            # NFS may repeat a request whose answer was lost: the second name is then our own
            return aside.stat().st_nlink == 2
        return True
    finally:
        aside.unlink(missing_ok=True)


@contextlib.contextmanager
def new_whole(path: Path, option: str) -> Iterator[Path]:
    """Another path to write a new file or folder at; when the block ends without an error it becomes `path`.

    Args:
        path: what shall appear.
        option: the option that names it, for error messages.

    Raises:
        InputError: there is something already, or it cannot be written.
    """
    if path.exists():
        raise InputError(option, f"{path} exists", fix=f"Choose another {option}, or delete it.")
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.touch()  # before any time is spent
        aside.unlink()
    except OSError as error:
        raise InputError(option, f"{path} cannot be written: {error.strerror}") from error
    try:
        yield aside
        if path.exists():
            raise InputError(option, f"{path} has appeared meanwhile", fix=f"Choose another {option}.")
        aside.rename(path)
    finally:
        if aside.is_dir():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole; NaN is refused, since other readers of JSON do not know it."""
    write_whole(path, as_json(value))


def as_json(value: Any) -> str:
    """The text of a JSON file. Raises ValueError for NaN and infinity."""
    return json.dumps(value, indent=1, allow_nan=False) + "\n"


def read_json(path: Path) -> Any:
    """Read JSON. Raises InputError where the file is missing or no JSON."""
    try:
        return json.loads(decoded(path.read_bytes(), path))
    except FileNotFoundError as error:
        raise InputError(path, "missing") from error
    except (OSError, ValueError) as error:
        raise InputError(path, "cannot be read", found=error) from error


def read_object(path: Path, *keys: str) -> dict[str, Any]:
    """Read JSON that is an object with these keys. Raises InputError where the file is missing or something else."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise InputError(path, "cannot be read", found=json.dumps(value)[:40], expected="a JSON object")
    missing = [key for key in keys if key not in value]
    if missing:
        raise InputError(path, "cannot be read", found=f"no {' and no '.join(missing)}")
    return value


def _write_synced(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
