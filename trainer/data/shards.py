"""Write samples into webdataset tars, and read any window of TRs out of one with a single read.

The tars are plain: `wds.WebDataset(url).decode()` reads them. An .npy inside an uncompressed tar is contiguous, so the
offset of its first element (kept in the manifest) gives the address of every TR; nothing before it has to be parsed.
A read is a copy out of a memory map straight into the caller's buffer, faster than `os.preadv` by up to a half; ranks
of a node share the page cache. Touching a map behind the end of its file kills the process, so the file's size is
looked at before each copy: a file that was cut short gives an error.
"""

from __future__ import annotations

import math
import mmap
import os
import re
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal

import numpy as np
import webdataset as wds

from trainer.data.manifest import (
    BOLD,
    MANIFEST,
    ArrayLocation,
    Manifest,
    Sample,
    check_file,
    content_hashes,
    describe_file,
)
from trainer.errors import InputError


@dataclass(frozen=True)
class SampleContent:
    """What goes into a tar for one sample: a key without dots, meta.json, and arrays by name (`bold` or a stream)."""

    key: str
    meta: Mapping[str, Any]
    arrays: Mapping[str, np.ndarray]


def extension(name: str) -> str:
    """The file extension of an array in the tar: `llama_3.2_3b/layers.11` -> `llama_3_2_3b__layers_11.npy`.

    webdataset takes everything up to the first dot for the key and lowers the case of the rest.
    """
    return re.sub(r"[^a-z0-9_-]", "_", name.lower().replace("/", "__")) + ".npy"


def write_shard(path: Path, samples: Iterable[SampleContent]) -> dict[str, dict[str, ArrayLocation]]:
    """Write one whole tar and return, for each sample key, where each of its arrays lies, with hashes of its content.

    Equal samples give equal bytes: times, owners and modes are fixed. Samples are taken one at a time.
    """
    names: dict[str, dict[str, str]] = {}
    hashes: dict[tuple[str, str], tuple[str, ...]] = {}
    with (
        path.open("wb") as file,
        wds.TarWriter(file, user="", group="", mode=0o444, mtime=0, format="GNU_FORMAT") as writer,
    ):
        for sample in samples:
            files = {extension(name): array for name, array in sample.arrays.items()}
            names[sample.key] = {extension(name): name for name in sample.arrays}
            hashes |= {(sample.key, name): content_hashes(name, array) for name, array in sample.arrays.items()}
            writer.write({"__key__": sample.key, "meta.json": dict(sample.meta), **files})
    return {
        key: {name: replace(place, hashes=hashes[key, name]) for name, place in arrays.items()}
        for key, arrays in _locate(path, names).items()
    }


def _locate(path: Path, names: Mapping[str, Mapping[str, str]]) -> dict[str, dict[str, ArrayLocation]]:
    """Addresses as they stand in the finished tar: read back, not computed."""
    found: dict[str, dict[str, ArrayLocation]] = {key: {} for key in names}
    with tarfile.open(path, "r:") as tar, path.open("rb") as file:
        for member in tar:
            key, _, end = member.name.partition(".")
            if not end.endswith(".npy"):
                continue
            found[key][names[key][end]] = read_npy_header(file, member.offset_data)
    return found


def read_npy_header(file: BinaryIO, offset: int) -> ArrayLocation:
    """What the .npy that begins at `offset` says about itself. Raises ValueError where there is none in C order."""
    file.seek(offset)
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran_order, dtype = read(file)
    if fortran_order:
        raise ValueError("found Fortran order, expected C order")
    return ArrayLocation(file.tell(), tuple(shape), np.dtype(dtype).name)


def check_first_array(path: Path, sample: Sample) -> None:
    """Compare the tar header and the .npy header at the start of a tar with its first sample in the manifest.

    One read of some hundred bytes: it tells another tar of the same size from the right one. Raises InputError.
    """
    name, place = min(sample.arrays.items(), key=lambda item: item[1].offset)
    expected = (f"{sample.key}.{extension(name)}", replace(place, hashes=()))  # a header does not tell the content
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            first = tar.next()
            found = (first.name, read_npy_header(file, first.offset_data)) if first else ("nothing", None)
    except OSError as error:
        raise InputError(path, f"cannot be read: {error.strerror or error}") from error
    except Exception as error:  # damaged bytes make tarfile and numpy raise whatever they come upon
        raise InputError(path, f"begins with no array: {error}", expected=expected[0], fix=_REBUILD) from error
    if found != expected:
        raise InputError(path, "begins with", found=_named(*found), expected=_named(*expected), fix=_REBUILD)


_REBUILD = "It is damaged or another tar: copy it or build the shards again."


def _named(name: str, place: ArrayLocation | None) -> str:
    return f"{name} {place.dtype} {place.shape} at byte {place.offset}" if place else name


@dataclass(frozen=True, slots=True)
class _Address:
    """An array as a window of it is read: `rows` subjects of BOLD (0 for a stream) of `n_trs` TRs of `row_bytes`."""

    key: str
    shard: int
    offset: int
    rows: int
    n_trs: int
    inner: tuple[int, ...]
    dtype: np.dtype
    row_bytes: int


class Shards:
    """A folder of shards, opened for reading. It can be pickled; files are opened where and when they are first read.

    Opening compares the size of every tar and the header of its first array with the manifest.

    Args:
        verify: `full` also compares the SHA-256 of every tar, which reads all of it.
        subjects: the subject axis of the manifest, where it is not the shards' own.

    Raises:
        InputError: the manifest or the statistics are missing or were changed, or a tar is missing or differs.
    """

    def __init__(
        self,
        folder: str | Path,
        verify: Literal["size", "full"] = "size",
        subjects: Sequence[str] | None = None,
    ) -> None:
        manifest = Manifest.load(folder)
        self.manifest = manifest if subjects is None else manifest.with_subjects(subjects)
        self.folder = Path(folder)
        first: dict[int, Sample] = {}
        for sample in self.manifest.samples:
            first.setdefault(sample.shard, sample)
        self._seen = {name: _inode(self.folder / name) for name in (MANIFEST, *(s.name for s in manifest.shards))}
        for i, record in enumerate(self.manifest.shards):
            check_file(self.folder, record, full=verify == "full")
            if i in first:
                check_first_array(self.folder / record.name, first[i])
        self._files: dict[int, tuple[mmap.mmap, np.ndarray]] = {}
        self._addresses: dict[tuple[int, str], _Address] = {}

    def read(
        self,
        sample: int,
        name: str,
        start: int,
        stop: int,
        out: np.ndarray | None = None,
        row: int | None = None,
    ) -> np.ndarray:
        """TRs [start, stop) of one array of a sample, in the stored dtype.

        Args:
            sample: index in manifest.samples.
            name: `bold` or a stream.
            out: C-contiguous buffer of the result's shape and dtype to read into.
            row: for `bold`, the one present subject to read, counted as in Sample.subjects; all of them without it.

        Returns: a stream gives (stop - start, D) or (stop - start, L, D); `bold` (S present, stop - start, V), or
            (stop - start, V) with `row`.

        Raises:
            InputError: the shard is shorter than the manifest says, or cannot be read.
        """
        place = self._addresses.get((sample, name)) or self._address(sample, name)
        if not 0 <= start <= stop <= place.n_trs:
            raise ValueError(f"{place.key}: TRs {start} to {stop} are outside its {place.n_trs} TRs")
        if row is None and name == BOLD:
            whole = _buffer(out, (place.rows, stop - start, *place.inner), place.dtype)
            for i, target in enumerate(whole):
                self.read(sample, name, start, stop, target, row=i)
            return whole
        if row is not None and not 0 <= row < place.rows:
            raise ValueError(f"{place.key}: {name} has no row {row}")
        out = _buffer(out, (stop - start, *place.inner), place.dtype)
        if out.size:
            self._fill(place, place.offset + ((row or 0) * place.n_trs + start) * place.row_bytes, out)
        return out

    def _address(self, sample: int, name: str) -> _Address:
        described = self.manifest.samples[sample]
        location = described.arrays[name]
        rows, (n_trs, *inner) = (location.shape[0], location.shape[1:]) if name == BOLD else (0, location.shape)
        dtype = np.dtype(location.dtype)
        row_bytes = dtype.itemsize * math.prod(inner)
        address = _Address(described.key, described.shard, location.offset, rows, n_trs, tuple(inner), dtype, row_bytes)
        self._addresses[sample, name] = address
        return address

    def _fill(self, place: _Address, offset: int, target: np.ndarray) -> None:
        """Copy the bytes that begin at `offset` into `target`."""
        end = offset + target.nbytes
        try:
            file, content = self._files.get(place.shard) or self._open(place.shard)
            size = file.size()  # of the file as it is now
        except OSError as error:
            raise InputError(self._path(place.shard), f"cannot be read: {error.strerror}") from error
        if end > min(size, len(content)):
            raise InputError(
                self._path(place.shard),
                f"ends inside {place.key}",
                found=f"{size} bytes",
                expected=f"{self.manifest.shards[place.shard].size} bytes",
                fix="Build the shards again.",
            )
        np.copyto(target.reshape(-1).view(np.uint8), content[offset:end])

    def _path(self, shard: int) -> Path:
        return self.folder / self.manifest.shards[shard].name

    def are_replaced(self) -> bool:
        """Whether the folder holds other shards by now than those that were opened."""
        now = _inode(self.folder / MANIFEST)
        if now is None or now == self._seen[MANIFEST]:
            return False
        self._seen[MANIFEST] = now
        return describe_file(self.folder / MANIFEST).sha256 != self.manifest.digest

    def _open(self, shard: int) -> tuple[mmap.mmap, np.ndarray]:
        with self._path(shard).open("rb") as file:
            if os.fstat(file.fileno()).st_ino != self._seen[self._path(shard).name]:
                fix = "The shards have been built again: run the command again."
                raise InputError(self._path(shard), "was replaced while it was in use", fix=fix)
            # FUSE mounts with direct I/O have no shared maps; one that is only read needs none
            mapped = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
        self._files[shard] = mapped, np.frombuffer(mapped, np.uint8)
        return self._files[shard]

    def close(self) -> None:
        """Close all files; a later read opens them again."""
        self._files.clear()

    def __enter__(self) -> Shards:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}


def _inode(path: Path) -> int | None:
    """Tells a file from one that takes its place; None where there is none."""
    try:
        return path.stat().st_ino
    except OSError:
        return None


def _buffer(out: np.ndarray | None, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    if out is None:
        return np.empty(shape, dtype)
    if out.shape != shape or out.dtype != dtype or not out.flags.c_contiguous:
        raise ValueError(f"out: found {out.dtype} {out.shape}, expected contiguous {dtype} {shape}")
    return out
