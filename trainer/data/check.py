"""Is a folder of shards whole, and does its manifest tell the truth?

Everything is compared with what the bytes say: checksums, the members of each tar and where they lie, the headers of
the arrays, their values, and the statistics, computed again. A problem does not end the search, so that one look tells
all; whatever damaged bytes do to a parser is itself a problem of that file.
"""

from __future__ import annotations

import json
import math
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from trainer.data.casts import LARGEST
from trainer.data.manifest import (
    BOLD,
    MANIFEST,
    ArrayLocation,
    Manifest,
    Moments,
    Sample,
    array_moments,
    check_file,
    content_hashes,
)  # fmt: skip
from trainer.data.shards import extension, read_npy_header
from trainer.errors import InputError
from trainer.progress import Tick, silent

TOLERANCE = 1e-9
"""Of a column's root mean square for means, of its sum of squares for M2: rounding of float64 sums, and no more."""

META = "meta.json"


@dataclass(frozen=True)
class _Tar:
    """One tar while it is looked through; `statistics` are those that could be read, by name.

    `zero` gathers, for each stream and each subject's BOLD, whether it is nothing but zeros in each run, by key.
    """

    manifest: Manifest
    path: Path
    file: BinaryIO
    members: Mapping[str, tarfile.TarInfo]
    statistics: Mapping[str, Moments]
    zero: dict[str, dict[str, bool]]


def find_problems(
    manifest: Manifest, tick: Tick = silent, warn: Callable[[str], None] = silent
) -> Iterator[InputError]:
    """All that is wrong with a folder, each as one line that names the file and, where there is one, the sample.

    Args:
        tick: called with the name of each tar that has been looked through.
        warn: told what is odd, but may be right.
    """
    contradictions = list(_contradictions(manifest))
    yield from contradictions
    yield from _strangers(manifest)
    yield from _problem(check_file, manifest.folder, manifest.statistics, full=True)
    if contradictions:  # what a manifest that contradicts itself says about bytes is not worth a comparison
        return
    statistics: dict[str, Moments] = {}
    zero: dict[str, dict[str, bool]] = {}
    for name in (BOLD, *(stream.name for stream in manifest.streams)):
        yield from _problem(_load_statistics, manifest, name, statistics)
    for i, record in enumerate(manifest.shards):
        yield from _problem(check_file, manifest.folder, record, full=True)
        yield from _tar_problems(manifest, i, statistics, zero)
        tick(record.name)
    for name, by_run in zero.items():
        keys = [key for key, is_zero in by_run.items() if is_zero]
        if len(keys) == len(by_run):
            fix = "Look at the source files, and build the shards again."
            yield InputError(manifest.folder / MANIFEST, f"{name}: all values are 0 in all runs", fix=fix)
        elif keys:
            warn(f"{name}: all values are 0 in {len(keys)} of {len(by_run)} runs: {', '.join(keys[:3])}")


def _problem(check: Callable[..., None], *arguments: Any, **options: Any) -> Iterator[InputError]:
    """What a check raises."""
    try:
        check(*arguments, **options)
    except InputError as error:
        yield error
    except OSError as error:
        yield InputError(error.filename or "disk", f"cannot be read: {error.strerror or error}")


def _strangers(manifest: Manifest) -> Iterator[InputError]:
    """Files that the manifest does not know. Those that are missing show where each is read."""
    known = {MANIFEST, manifest.statistics.name, *(record.name for record in manifest.shards)}
    for path in sorted(manifest.folder.iterdir()):
        if path.name not in known:
            yield InputError(path, "not in the manifest", expected="only what the manifest lists")


def _contradictions(manifest: Manifest) -> Iterator[InputError]:
    """What cannot be true, whatever the bytes are."""
    path = manifest.folder / MANIFEST
    for key, count in Counter(sample.key for sample in manifest.samples).items():
        if count > 1:
            yield InputError(path, f"{key}: a sample listed twice")
    used = {sample.shard for sample in manifest.samples}
    if used != set(range(len(manifest.shards))):
        yield InputError(path, "tars of samples", found=sorted(used), expected=f"0 to {len(manifest.shards) - 1}, all")
    for sample in manifest.samples:
        where = f"{path}: {sample.key}"
        if list(sample.subjects) != [label for label in manifest.subjects if label in sample.subjects]:
            yield InputError(
                where, "subjects", found=sample.subjects, expected=f"some of {manifest.subjects}, in order"
            )
        if sample.wanted and not _can_be_wanted(manifest, sample):
            expected = f"TRs to predict by subject, {sample.n_trs} at most and once, in a run without BOLD"
            yield InputError(where, "wanted", found=dict(sample.wanted), expected=expected)
        shapes = _shapes(manifest, sample)
        found = {name: (place.shape, place.dtype) for name, place in sample.arrays.items()}
        for name in [name for name in shapes | found if shapes.get(name) != found.get(name)]:
            yield InputError(where, name, found=found.get(name, "no array"), expected=shapes.get(name, "no array"))


def _can_be_wanted(manifest: Manifest, sample: Sample) -> bool:
    """Whether `wanted` fits the run: it is as long as the most that is wanted of it."""
    numbers = sample.wanted.values()
    known = set(sample.wanted) <= set(manifest.subjects) and not sample.subjects
    return known and min(numbers) > 0 and max(numbers) == sample.n_trs


def _shapes(manifest: Manifest, sample: Sample) -> dict[str, tuple[tuple[int, ...], str]]:
    bold = (len(sample.subjects), sample.n_trs, manifest.parcels)
    return {BOLD: (bold, "float32"), **{s.name: ((sample.n_trs, *s.row), s.dtype) for s in manifest.streams}}


def _load_statistics(manifest: Manifest, name: str, loaded: dict[str, Moments]) -> None:
    """Add the stored moments of a stream or `bold`. Raises InputError where they are missing or of another shape."""
    moments = manifest.moments(name)
    runs = len(manifest.samples)
    if name == BOLD:
        count: tuple[int, ...] = (runs, len(manifest.subjects))
        mean = (*count, manifest.parcels)
    else:
        count, mean = (runs,), (runs, manifest.stream(name).width)
    found = [getattr(moments, f.name).shape for f in fields(Moments)]
    if found != [count, mean, mean]:
        path = manifest.folder / manifest.statistics.name
        raise InputError(path, f"{name}: shapes", found=found, expected=[count, mean, mean])
    loaded[name] = moments


def _tar_problems(
    manifest: Manifest, shard: int, statistics: Mapping[str, Moments], zero: dict[str, dict[str, bool]]
) -> Iterator[InputError]:
    path = manifest.folder / manifest.shards[shard].name
    samples = [i for i, sample in enumerate(manifest.samples) if sample.shard == shard]
    members: dict[str, tarfile.TarInfo] = {}
    try:
        file = path.open("rb")
    except OSError:  # a missing or unreadable file was said when its checksum was compared
        return
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.name in members or not member.isreg():
                    yield InputError(f"{path}: {member.name}", "a second member of that name, or no plain file")
                members[member.name] = member
    except Exception as error:  # damaged bytes make tarfile raise whatever it comes upon
        yield InputError(path, "not a whole, uncompressed tar", found=error)
    expected = [name for i in samples for name in _member_names(manifest.samples[i])]
    if list(members) != expected:
        yield from _order_problems(path, list(members), expected)
    with file:
        tar_file = _Tar(manifest, path, file, members, statistics, zero)
        for i in samples:
            yield from _problem(_check_meta, tar_file, i)
            for name in manifest.samples[i].arrays:
                yield from _problem(_check_array, tar_file, i, name)


def _member_names(sample: Sample) -> list[str]:
    """The members of a sample in the order in which webdataset writes them."""
    return [f"{sample.key}.{end}" for end in sorted([META, *(extension(name) for name in sample.arrays)])]


def _order_problems(path: Path, found: Sequence[str], expected: Sequence[str]) -> Iterator[InputError]:
    present, wanted = set(found), set(expected)
    for name in (name for name in expected if name not in present):
        yield InputError(f"{path}: {name}", "missing in the tar")
    for name in (name for name in found if name not in wanted):
        yield InputError(f"{path}: {name}", "not in the manifest")
    if present == wanted:
        first = next((f, e) for f, e in zip(found, expected, strict=True) if f != e)
        yield InputError(path, "order of the members", found=first[0], expected=first[1])


def _check_meta(tar: _Tar, index: int) -> None:
    """meta.json is what those see who read the tars without the manifest: it must say the same. Raises InputError."""
    sample = tar.manifest.samples[index]
    member = tar.members.get(f"{sample.key}.{META}")
    if member is None:
        return
    where = f"{tar.path}: {sample.key}: {META}"
    tar.file.seek(member.offset_data)
    try:
        found = dict(json.loads(tar.file.read(member.size)))
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(where, "not a JSON object", found=error) from error
    expected = {name: getattr(sample, name) for name in _IN_META}
    expected |= {"tr": tar.manifest.tr, "subjects": list(sample.subjects)}
    expected["streams"] = {extension(stream.name): stream.name for stream in tar.manifest.streams}
    for name in expected | found:
        if found.get(name, "nothing") != expected.get(name, "nothing"):
            raise InputError(where, name, found=found.get(name, "nothing"), expected=expected.get(name, "nothing"))


_IN_META = ("series", "run", "repeat", "season", "episode", "film", "part", "n_trs")


def _check_array(tar: _Tar, index: int, name: str) -> None:
    """Compare one array with its address, and its values with its statistics. Raises InputError."""
    sample = tar.manifest.samples[index]
    member = tar.members.get(f"{sample.key}.{extension(name)}")
    if member is None:
        return
    where = f"{tar.path}: {sample.key}: {name}"
    array = _read_array(where, tar.file, member, sample.arrays[name])
    finite = np.isfinite(array)
    if not finite.all():
        at = tuple(int(i) for i in np.argwhere(~finite)[0])
        raise InputError(where, "not finite", found=f"{array[at]} at {at}", fix=f"{int((~finite).sum())} in all.")
    if array.size and max(abs(float(array.max())), abs(float(array.min()))) > LARGEST:
        at = tuple(int(i) for i in np.argwhere(np.abs(array) > LARGEST)[0])
        raise InputError(
            where, "too large to compute with", found=f"{array[at]:g} at {at}", expected=f"at most {LARGEST:.2g}"
        )
    parts = (
        zip((f"BOLD of subject {s}" for s in sample.subjects), array, strict=True) if name == BOLD else [(name, array)]
    )
    for part, values in parts:
        tar.zero.setdefault(part, {})[sample.key] = not values.any()
    if name in tar.statistics:
        stored = Moments(*(getattr(tar.statistics[name], f.name)[index] for f in fields(Moments)))
        _check_moments(where, array_moments(name, array, sample.subjects, tar.manifest.subjects), stored)
    hashes = sample.arrays[name].hashes
    if hashes and hashes != content_hashes(name, array):
        raise InputError(where, "hash of the content", found=content_hashes(name, array), expected=hashes)


def _read_array(where: str, file: BinaryIO, member: tarfile.TarInfo, place: ArrayLocation) -> np.ndarray:
    """The array as the tar holds it. Raises InputError where it is not what the manifest says."""
    try:
        found = read_npy_header(file, member.offset_data)
    except Exception as error:  # damaged bytes make numpy's parser raise whatever it comes upon
        raise InputError(where, "no .npy header", found=error) from error
    for field in ("offset", "shape", "dtype"):
        if getattr(found, field) != getattr(place, field):
            raise InputError(where, field, found=getattr(found, field), expected=getattr(place, field))
    dtype = np.dtype(place.dtype)
    size = math.prod(place.shape) * dtype.itemsize
    inside = member.offset_data + member.size - place.offset
    content = file.read(size)
    if not len(content) == size == inside:
        raise InputError(where, "bytes", found=min(len(content), inside), expected=size)
    return np.frombuffer(content, dtype).reshape(place.shape)


def _check_moments(where: str, computed: Moments, stored: Moments) -> None:
    if not np.array_equal(computed.count, stored.count):
        found, expected = stored.count.tolist(), computed.count.tolist()
        raise InputError(where, "count in the statistics", found=found, expected=expected)
    count = np.maximum(np.asarray(computed.count, np.float64)[..., None], 1)
    squares = computed.m2 + count * np.square(computed.mean)
    for field, scale in (("mean", np.sqrt(squares / count)), ("m2", squares)):
        found, expected = getattr(stored, field), getattr(computed, field)
        wrong = ~(np.abs(found - expected) <= TOLERANCE * scale)  # so that a NaN is wrong
        if wrong.any():
            at = tuple(int(i) for i in np.argwhere(wrong)[0])
            raise InputError(
                where,
                f"{field} in the statistics at {at}",
                found=f"{found[at]:.17g}",
                expected=f"{expected[at]:.17g} within {TOLERANCE:g}",
                fix=f"{int(wrong.sum())} value(s) differ.",
            )
