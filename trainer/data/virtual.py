"""Virtual HDF5 data sets: are all the numbers there that they promise?

A virtual data set is a mosaic of parts of other data sets. Where a part is missing, or nothing was ever mapped, HDF5
gives the fill value without a word.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from trainer.errors import InputError

_DEEPEST = 16
"""Virtual data sets of virtual data sets of ...: a circle of them ends here."""


def check_virtual(item: h5py.Dataset, where: str, check: Callable[[h5py.Dataset, str], None], depth: int = 0) -> None:
    """Raise InputError where a part of a virtual data set is not mapped, or its source is not there, or is too small.

    Args:
        check: called with each source that is no virtual data set itself.
    """
    if depth == _DEEPEST:
        raise InputError(where, "virtual data sets that are made of each other")
    mapped = np.zeros(item.shape, bool)
    for part in item.virtual_sources():
        name = f"{part.file_name}: {part.dset_name}"
        if "%b" in part.file_name or "%b" in part.dset_name:
            raise InputError(
                where, "a virtual data set over numbered sources, of which nothing tells the number", found=name
            )
        for block in _blocks(part.vspace, item.shape):
            mapped[np.ix_(*block)] = True
        with _source_file(item, part.file_name, where) as file:
            source = file.get(part.dset_name)
            if not isinstance(source, h5py.Dataset):
                raise InputError(where, "a source of this virtual data set is not there", found=name)
            if not _holds(source.shape, part.src_space, part.vspace, item.shape):
                raise InputError(where, f"the source {name} of this virtual data set is too small", found=source.shape)
            if item.dtype.kind in "iu" and not np.can_cast(source.dtype, item.dtype, "safe"):
                raise InputError(
                    where,
                    f"the type of this virtual data set cuts the numbers of {name}",
                    found=item.dtype,
                    expected=f"{source.dtype}, as there",
                )
            if source.is_virtual:
                check_virtual(source, f"{where}: {name}", check, depth + 1)
            else:
                check(source, f"{where}: {name}")
    if not mapped.all():
        raise InputError(
            where,
            "a virtual data set of which a part has no source",
            found=f"{int((~mapped).sum())} of {mapped.size} numbers, read as {item.fillvalue}",
            expected="none",
        )


def _source_file(item: h5py.Dataset, name: str, where: str) -> h5py.File:
    """The file of a source, looked for in the places where HDF5 looks. Raises InputError where it is not there."""
    own = Path(item.file.filename)
    if name == ".":
        return h5py.File(own, "r", locking=False)
    places = [own.parent, Path.cwd(), Path(os.path.realpath(own)).parent]
    if prefix := os.environ.get("HDF5_VDS_PREFIX"):
        places.insert(0, Path(prefix.replace("${ORIGIN}", str(own.parent))))
    for path in (place / name for place in places):
        if path.is_file():
            try:
                return h5py.File(path, "r", locking=False)
            except OSError as error:
                raise InputError(
                    where, f"the source {path} of this virtual data set cannot be read", found=error
                ) from error
    raise InputError(
        where,
        "a source of this virtual data set is not there",
        found=f"no file {name}",
        fix="Copy it too, or write a file that holds the numbers themselves, e.g. with h5py.",
    )


def _blocks(space: Any, shape: tuple[int, ...]) -> Iterator[list[np.ndarray]]:
    """Places along each axis that a selection covers, cut to `shape`, one list for each block."""
    if space.get_select_type() == h5py.h5s.SEL_ALL:
        yield [np.arange(length) for length in shape]
    elif space.get_select_type() == h5py.h5s.SEL_HYPERSLABS and space.is_regular_hyperslab():
        yield [_along(*axis) for axis in zip(*space.get_regular_hyperslab(), shape, strict=True)]
    elif space.get_select_type() == h5py.h5s.SEL_HYPERSLABS:
        for first, last in space.get_select_hyper_blocklist():
            yield [np.arange(low, high + 1) for low, high in zip(first, last, strict=True)]


def _along(start: int, stride: int, count: int, block: int, length: int) -> np.ndarray:
    count = min(count, length)  # of an unlimited selection it is beyond any number
    places = (start + stride * np.arange(count)[:, None] + np.arange(min(block, length))).ravel()
    return places[places < length]


def _holds(source: tuple[int, ...], selected: Any, target: Any, shape: tuple[int, ...]) -> bool:
    """Whether a source of that shape has all that is selected of it; of an unlimited selection it always has."""
    if selected.get_select_type() == h5py.h5s.SEL_ALL:
        wanted = sum(math.prod(map(len, block)) for block in _blocks(target, shape))
        return math.prod(source) >= wanted
    if selected.is_regular_hyperslab():
        ends = [s + (c - 1) * t + b for s, t, c, b in zip(*selected.get_regular_hyperslab(), strict=True)]
        return all(
            count == h5py.h5s.UNLIMITED or end <= length
            for end, length, count in zip(ends, source, selected.get_regular_hyperslab()[2], strict=True)
        )
    return all(last < length for last, length in zip(selected.get_select_bounds()[1], source, strict=True))
