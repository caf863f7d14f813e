"""HDF5 data sets, named, described and read; one that HDF5 would read as other numbers than were written is refused.

HDF5 gives its fill value, mostly 0, for whatever is not there: chunks that were never written, virtual data sets whose
sources are gone, raw files that end early. It reads packed and enumerated integers as they are stored. None of that is
an error to h5py, so it is looked for here, before anything is read.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from trainer.data.runs import Source
from trainer.data.virtual import check_virtual
from trainer.errors import InputError

_FAILURES = (OSError, RuntimeError, KeyError, ValueError, TypeError)
"""What h5py raises for a file that it cannot make sense of: it depends on where in the file the damage is."""


@contextlib.contextmanager
def opened(path: Path) -> Iterator[h5py.File]:
    """An HDF5 file for reading. Raises InputError that names the file where it cannot be read or is being written."""
    _check_unwritten(path)
    try:
        file = h5py.File(path, "r", locking=False)
    except PermissionError as error:
        raise InputError(path, "cannot be read: Permission denied", fix="Ask its owner for it.") from error
    except OSError as error:
        if "already open for" in str(error):
            raise InputError(
                path,
                "is marked as open for writing",
                expected="a closed file",
                fix="Wait for the program that writes it; if that has crashed, check the file, then `h5clear -s` it.",
            ) from error
        size = f"{path.stat().st_size} bytes" if path.exists() else "no such file (a broken link?)"
        raise InputError(
            path, "not a whole HDF5 file", found=f"{size} ({error})", fix="Download or copy it again."
        ) from error
    with file:
        yield file


def _check_unwritten(path: Path) -> None:
    """Raise InputError where another program holds the lock of a writer; file systems without locks say nothing."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN):
            raise InputError(
                path, "is open for writing in another program", expected="a closed file", fix="Close it there first."
            ) from error


def dataset_names(path: Path) -> list[str]:
    """The names of all data sets of a file, also of those behind links, and of links that lead nowhere."""
    names: list[str] = []

    def walk(group: h5py.Group, prefix: str, above: tuple[h5py.Group, ...]) -> None:
        for name in group:
            item = _item(group, name)
            if item is None or isinstance(item, h5py.Dataset):
                names.append(prefix + name)
            elif isinstance(item, h5py.Group) and item not in above:
                walk(item, f"{prefix}{name}/", (*above, item))

    with opened(path) as file:
        try:
            walk(file, "", (file["/"],))
        except _FAILURES as error:
            raise InputError(path, "a damaged HDF5 file", found=error, fix="Download or copy it again.") from error
    return names


def is_same(path: Path, first: str, second: str) -> bool:
    """Whether two names of a file stand for one data set, by a link."""
    with opened(path) as file:
        return _item(file, first) == _item(file, second) is not None


def describe(path: Path, name: str, dimensions: tuple[int, ...], expected: str) -> Source:
    """Describe a data set without reading it.

    Raises:
        InputError: it has other dimensions, holds no plain numbers, or cannot be read as it was written.
    """
    with opened(path) as file:
        item = _item(file, name)
        if item is None:
            raise InputError(path, f"{name}: {_broken_link(file, name)}", fix="Put the file there, or copy the data.")
        if not isinstance(item, h5py.Dataset):
            raise InputError(path, name, found="a group", expected="a data set")
        try:
            shape, dtype = item.shape, item.dtype
        except _FAILURES as error:
            raise InputError(path, f"{name}: type", found=error, expected="numbers") from error
        if shape is None:
            raise InputError(path, f"{name}: shape", found="an empty data set (null)", expected=expected)
        if len(shape) not in dimensions or 0 in shape:
            raise InputError(path, f"{name}: shape", found=shape, expected=expected)
        if h5py.check_enum_dtype(dtype) is not None or dtype.kind not in "fiu":
            found = "an enumeration" if dtype.kind in "fiu" else dtype
            raise InputError(path, f"{name}: type", found=found, expected="numbers")
        check_readable(item, f"{path}: {name}")
        return Source(path, name, tuple(shape))


def check_readable(item: h5py.Dataset, where: str) -> None:
    """Raise InputError where the numbers that h5py reads of a data set are not those that were put into it."""
    try:
        _check_filters(item, where)
        _check_packing(item, where)
        if item.is_virtual:
            check_virtual(item, where, check_readable)
        elif item.external:
            _check_raw_files(item, where)
        else:
            _check_written(item, where)
    except _FAILURES as error:
        raise InputError(where, "cannot be read", found=error, fix="Download or copy the file again.") from error


def read(source: Source, n_trs: int) -> np.ndarray:
    """The first `n_trs` rows of a data set, without the columns that are left out.

    Raises:
        InputError: it cannot be read, or holds what its own attributes call a missing value.
    """
    with opened(source.file) as file:
        try:
            item = file[source.dataset]
            values: np.ndarray = item[:n_trs]
            marks = [mark for name in ("_FillValue", "missing_value") for mark in _numbers(item, name)]
        except _FAILURES as error:
            raise InputError(
                str(source), "cannot be read", found=error, fix="Download or copy the file again."
            ) from error
    if source.dropped:
        values = np.delete(values, source.dropped, axis=-1)
    for mark in (mark for mark in marks if math.isfinite(mark) and mark):
        missing = values == np.asarray(mark).astype(values.dtype)
        if missing.any():
            raise InputError(
                str(source),
                "missing values",
                found=f"{int(missing.sum())} values of {mark:g}, which its attributes say stands for a missing one",
                expected="a number everywhere",
            )
    return values


def _item(group: h5py.Group, name: str) -> Any:
    """What a name stands for, or None where the link leads nowhere."""
    try:
        return group[name]
    except (KeyError, OSError, RuntimeError):
        return None


def _broken_link(file: h5py.File, name: str) -> str:
    link = file.get(name, getlink=True)
    if isinstance(link, h5py.ExternalLink):
        return f"a link to {link.path} in {link.filename} that leads nowhere"
    if isinstance(link, h5py.SoftLink):
        return f"a link to {link.path} that leads nowhere"
    return "cannot be opened"


def _check_filters(item: h5py.Dataset, where: str) -> None:
    created = item.id.get_create_plist()
    for i in range(created.get_nfilters()):
        code, _, _, name = created.get_filter(i)
        if not h5py.h5z.filter_avail(code):
            raise InputError(
                where,
                "compressed by a filter that is not installed",
                found=f"{name.decode(errors='replace') or 'filter'} (HDF5 filter {code})",
                fix="Rewrite the file with `h5repack -f GZIP=4` where the filter is, or point HDF5_PLUGIN_PATH to it.",
            )


def _check_packing(item: h5py.Dataset, where: str) -> None:
    for name, nothing in (("scale_factor", 1), ("add_offset", 0)):
        if any(number != nothing for number in _numbers(item, name)):
            raise InputError(
                where,
                f"packed numbers, which are not those that are meant: attribute {name}",
                found=_numbers(item, name)[0],
                fix="Write the unpacked numbers.",
            )


def _numbers(item: h5py.Dataset, name: str) -> list[float]:
    """The numbers of an attribute; none where there is no such attribute, or another kind."""
    try:
        values = np.atleast_1d(item.attrs[name]) if name in item.attrs else np.zeros(0)
        return [float(value) for value in values.ravel()] if values.dtype.kind in "fiu" else []
    except _FAILURES:
        return []


def _check_raw_files(item: h5py.Dataset, where: str) -> None:
    """HDF5 looks for raw files from the working directory, and reads zeros behind the end of one."""
    remaining = item.size * item.dtype.itemsize
    for name, offset, size in item.external:
        used = min(size, remaining)
        remaining -= used
        path = Path(name)
        there = path.stat().st_size if path.is_file() else None
        if there is None or there < offset + used:
            raise InputError(
                where,
                f"the numbers lie in the raw file {name}",
                found="no such file" if there is None else f"{there} bytes",
                expected=f"{offset + used} bytes",
                fix="Put it there (from the folder in which the command runs), or copy the numbers into the file.",
            )


def _check_written(item: h5py.Dataset, where: str) -> None:
    if item.chunks is None:
        total, written, what = 1, int(item.id.get_storage_size() > 0), "the data set"
    else:
        total = math.prod(-(-length // chunk) for length, chunk in zip(item.shape, item.chunks, strict=True))
        written, what = item.id.get_num_chunks(), "some chunks of the data set"
    if written < total:
        raise InputError(
            where,
            f"{what} were never written" if total > 1 else "was never written",
            found=f"{written} of {total}, elsewhere the fill value {item.fillvalue}",
            expected="all of it",
            fix="Write the file again: the program that wrote it may have been stopped.",
        )
