"""Files that appear whole: a reader sees all of one, or the one before it.

Every file of a run is written through `whole`, or made through `write_new` where several processes may want to make
it. Both ask little of the file system: a rename, and that only one process can create a file. Hard links, and the
`fsync` of a folder, are used where they are there (exFAT, SMB shares and several FUSE mounts lack them).
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from trainer.errors import REFUSALS, InputError
from trainer.text import decoded

_NO_FSYNC = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EBADF, errno.EACCES, errno.EPERM}


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Another path to write a file at; when the block ends without an error it takes the place of `path`.

    The file gets the mode of any new file in that folder (umask, default ACL), whatever writes it: safetensors makes
    files that nobody else may read.

    Raises:
        OSError: it cannot be written; names `path`. What stood there is untouched.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with naming(path, aside):
            _make_folder(path.parent)
            aside.unlink(missing_ok=True)  # of a killed process of the same number, with a mode of its own
            with aside.open("xb") as file:
                mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            yield aside
            if stat.S_IMODE(aside.stat().st_mode) != mode:
                aside.chmod(mode)
            to_disk(aside)
            aside.replace(path)
    finally:
        _remove(aside)


@contextlib.contextmanager
def naming(path: Path, aside: Path) -> Iterator[None]:
    """Let an OSError of the block name `path` where it names no file (a full disk), or the one written aside."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename not in (None, str(aside), aside):
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error


def write_whole(path: Path, text: str) -> None:
    """Write a text file so that a reader sees all of it or the old one."""
    with whole(path) as aside:
        aside.write_text(text)


def write_new(path: Path, text: str) -> bool:
    """Write a text file that nobody else may have made; False where it is there already.

    Of several processes, on any hosts that share the file system, exactly one makes the file. A hard link decides, and
    the file appears with its content. Where there are no hard links an exclusive creation decides: a reader may then
    see less than the whole text for a moment, or for good where its writer dies in between.
    """
    aside = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}")
    try:
        with naming(path, aside):
            _make_folder(path.parent)
            with aside.open("w") as file:
                _write_synced(file, text)
            try:
                os.link(aside, path)
            except FileExistsError:
                # NFS may repeat a request whose answer was lost: the second name is then our own
                return aside.stat().st_nlink == 2
            except OSError:  # EPERM, ENOTSUP, ENOSYS, EMLINK, ...: if the folder is at fault, the next line says so
                return _create(path, text)
            return True
    finally:
        _remove(aside)


def _create(path: Path, text: str) -> bool:
    """Write a text file where there is none; False where there is one."""
    try:
        file = path.open("x")
    except FileExistsError:
        return False
    try:
        with file:
            _write_synced(file, text)
    except BaseException:
        _remove(path)  # it would stand for a process that never was
        raise
    return True


@contextlib.contextmanager
def new_whole(path: Path, option: str) -> Iterator[Path]:
    """Another path to write a new file or folder at; when the block ends without an error it becomes `path`.

    Args:
        path: what shall appear.
        option: the option that names it, for error messages.

    Raises:
        InputError: there is something already, or it cannot be written.
    """
    if os.path.lexists(path):  # an empty path too: it is the folder that the program runs in
        raise InputError(option, f"{path} exists", fix=f"Choose another {option}, or delete it.")
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        _make_folder(path.parent)
        aside.touch()  # before any time is spent
        aside.unlink()
    except OSError as error:
        raise InputError(option, f"{path} cannot be written: {error.strerror}") from error
    try:
        yield aside
        if os.path.lexists(path):
            raise InputError(option, f"{path} has appeared meanwhile", fix=f"Choose another {option}.")
        to_disk(aside)
        aside.rename(path)
    except OSError as error:
        # h5py names no file
        ours = error.filename is None or Path(str(error.filename)).is_relative_to(aside)
        if error.errno not in REFUSALS or not ours:
            raise
        raise InputError(option, f"{path} cannot be written: {os.strerror(error.errno)}") from error
    finally:
        _remove(aside)


def check_writable(folder: Path, fix: str | None = None) -> None:
    """Make a folder where it is not there, and raise InputError where no file can be made in it.

    To be asked before any time is spent on what shall be written there.
    """
    probe = folder / f".probe.{os.getpid()}"
    try:
        _make_folder(folder)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(folder, f"cannot be written: {error.strerror}", fix=fix) from error


def _make_folder(folder: Path) -> None:
    """Make a folder where there is none. Raises OSError; of a file in its place, that it is no folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), error.filename) from error


def names(folder: Path) -> list[str]:
    """The names in a folder, none where it is not there. Raises OSError where it cannot be read: glob says nothing."""
    try:
        return os.listdir(folder)  # noqa: PTH208  (a Path for each name costs ten times the listing)
    except FileNotFoundError:
        return []


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
    except OSError as error:
        raise InputError(path, f"cannot be read: {error.strerror}") from error
    except ValueError as error:
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


def to_disk(path: Path) -> None:
    """Wait until a file, or what a folder lists, is on the disk, where the file system can say so."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        _sync(descriptor)
    finally:
        os.close(descriptor)


def _write_synced(file: TextIO, text: str) -> None:
    file.write(text)
    file.flush()
    _sync(file.fileno())


def _sync(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FSYNC:
            raise


def _remove(path: Path) -> None:
    """Remove what was written aside, a file or a folder; what cannot be removed hides no other error."""
    with contextlib.suppress(OSError):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
