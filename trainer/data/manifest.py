"""What a folder of shards holds: streams, subjects, runs, where each array lies to the byte, statistics, checksums.

`manifest.json` is read by every process at its start, so it stays small; the statistics of each run lie beside it in
`statistics.safetensors` and are read by name when they are needed. The manifest carries the SHA-256 of its own
content, of the statistics and of every tar: an edited or torn file is noticed.

Beside its address each array has a hash of its content (one for each subject's BOLD), by which a run knows its data
again in other tars. Shards from before there were such hashes lack them, and are read as ever.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from trainer.data.keys import file_stems
from trainer.errors import InputError

MANIFEST = "manifest.json"
STATISTICS = "statistics.safetensors"
FORMAT = 1
BOLD = "bold"


@dataclass(frozen=True)
class Stream:
    """One feature stream: rows of `width` values, or of `layers` x `width` where layers > 1."""

    name: str
    layers: int
    width: int
    dtype: str

    @property
    def row(self) -> tuple[int, ...]:
        """Shape of one TR: (D,) or (L, D)."""
        return (self.width,) if self.layers == 1 else (self.layers, self.width)


@dataclass(frozen=True)
class ArrayLocation:
    """An array inside a tar: `offset` is the byte of its first element, after tar and .npy headers.

    `hashes` are of its content, see `content_hashes`; empty where they are not known.
    """

    offset: int
    shape: tuple[int, ...]
    dtype: str
    hashes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sample:
    """One showing of one run. `subjects` are the labels that have BOLD, in the order of the rows of `bold`.

    A run without any BOLD has no subjects and a `bold` of no rows; `wanted` then says how many TRs of each subject are
    to be predicted, where that is known (label -> TRs, at most `n_trs`).
    """

    key: str
    shard: int
    series: str
    run: str
    repeat: int
    season: int | None
    episode: int | None
    film: str | None
    part: str | None
    n_trs: int
    subjects: tuple[str, ...]
    arrays: Mapping[str, ArrayLocation]
    wanted: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Skipped:
    """A run that was left out on request, and why; with a subject only that subject's scan of it.

    Where a file that holds a subject's scans of a whole series cannot be read, `run` is the series.
    """

    run: str
    reason: str
    subject: str = ""

    def __str__(self) -> str:
        return f"{self.run}: {f'subject {self.subject}: ' if self.subject else ''}{self.reason}"


@dataclass(frozen=True)
class FileRecord:
    """A file of the folder, with what it takes to notice that it is another one."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Moments:
    """Count, mean and sum of squared deviations (M2) in float64.

    With a leading axis they are those of many runs: count (R,) or (R, S); mean and m2 (R, D) or (R, S, V).
    """

    count: np.ndarray
    mean: np.ndarray
    m2: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray) -> Moments:
        """Moments over all axes but the last: (T, D) or (T, L, D) -> count (), mean (D,), m2 (D,)."""
        rows = np.asarray(values, np.float64).reshape(-1, values.shape[-1])
        mean = rows.mean(0)
        return cls(np.asarray(len(rows), np.int64), mean, np.square(rows - mean).sum(0))

    @classmethod
    def stack(cls, parts: Sequence[Moments]) -> Moments:
        """Several moments of one shape, along a new first axis."""
        return cls(*(np.stack([getattr(p, f.name) for p in parts]) for f in fields(cls)))

    @classmethod
    def concatenate(cls, parts: Sequence[Moments]) -> Moments:
        """Several stacks of moments, one behind the other."""
        return cls(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(cls)))

    def combine(self) -> Moments:
        """The moments of the union over the first axis.

        Chan, Golub and LeVeque's update for many parts at once: the M2 of the parts plus n (mean - total mean)^2.
        Parts of count 0 do not enter.
        """
        weight = np.asarray(self.count, np.float64)[..., None]
        total = weight.sum(0)
        safe = np.maximum(total, 1)
        mean = (weight * self.mean).sum(0) / safe
        m2 = (np.where(weight > 0, self.m2, 0) + weight * np.square(self.mean - mean)).sum(0)
        return Moments(np.asarray(self.count).sum(0), mean, m2)

    def std(self) -> np.ndarray:
        """Population standard deviation, of the shape of the mean."""
        return np.sqrt(self.m2 / np.maximum(np.asarray(self.count, np.float64)[..., None], 1))


@dataclass(frozen=True)
class Manifest:
    """A folder of shards, described. Arrays of a sample are named `bold` or like their stream.

    Attributes:
        subjects: labels, in the order of the subject axis of models and scores.
        skipped: the runs and scans that were left out because something was wrong with them.
        digest: SHA-256 of manifest.json; empty of a manifest that was not read from one.
        stored_subjects: labels in the order of the statistics, where `with_subjects` has given another axis.
        dropped_parcels: the columns of the source files, counted from 0, that `parcels` does not count.
    """

    name: str
    tr: float
    subjects: tuple[str, ...]
    parcels: int
    streams: tuple[Stream, ...]
    samples: tuple[Sample, ...]
    shards: tuple[FileRecord, ...]
    statistics: FileRecord
    folder: Path = field(default=Path(), compare=False)
    skipped: tuple[Skipped, ...] = ()
    dropped_parcels: tuple[int, ...] = ()
    digest: str = field(default="", compare=False)
    stored_subjects: tuple[str, ...] | None = None

    def with_subjects(self, labels: Sequence[str]) -> Manifest:
        """The manifest on the subject axis of a model: people that it does not know are left out.

        A label that the shards lack stays on the axis, as a subject without BOLD.
        """
        stored = self.subjects if self.stored_subjects is None else self.stored_subjects
        return replace(self, subjects=tuple(labels), stored_subjects=stored)

    @cached_property
    def file_stems(self) -> list[str]:
        """For each sample what the name of a file about it begins with."""
        return file_stems([sample.key for sample in self.samples])

    def stream(self, name: str) -> Stream:
        """The stream of that name. Raises InputError that lists what the shards hold."""
        for stream in self.streams:
            if stream.name == name:
                return stream
        raise InputError(
            self.folder,
            f"no stream {name}",
            found=", ".join(s.name for s in self.streams),
            fix="Build the shards with --features that include it, or leave it out of include_features.",
        )

    def moments(self, name: str) -> Moments:
        """Moments of a stream or of `bold` for each run, read from the statistics.

        Returns: for a stream count (R,), mean (R, D); for `bold` count (R, S) with 0 where a subject is absent, mean
            (R, S, V). D is the width: layers are pooled, as one linear map reads them all.
        """
        path = self.folder / self.statistics.name
        try:
            with safe_open(path, framework="numpy") as file:
                stored = Moments(*(file.get_tensor(f"{f.name}:{name}") for f in fields(Moments)))
        except (OSError, SafetensorError) as error:
            raise InputError(
                path, f"statistics of {name} cannot be read: {error}", fix="Build the shards again."
            ) from error
        return stored if name != BOLD or self.stored_subjects is None else self._on_axis(stored, self.stored_subjects)

    def _on_axis(self, stored: Moments, labels: Sequence[str]) -> Moments:
        """Moments of BOLD (R, S stored, ...) on the subject axis (R, S, ...); count 0 of a label that is not stored."""
        columns = np.array([labels.index(label) if label in labels else len(labels) for label in self.subjects], int)
        padded = (np.pad(a, [(0, 0), (0, 1), *[(0, 0)] * (a.ndim - 2)]) for a in (stored.count, stored.mean, stored.m2))
        return Moments(*(array[:, columns] for array in padded))

    def save(self, folder: Path) -> None:
        """Write manifest.json into a folder that holds the statistics and the shards already."""
        (folder / MANIFEST).write_text(self._text())

    def _text(self, *, with_hashes: bool = True) -> str:
        """What manifest.json holds, or held before there were hashes of contents."""
        content = asdict(self)
        for key in ("folder", "digest", "stored_subjects"):
            del content[key]
        for sample in content["samples"]:
            if not sample["wanted"]:  # so that shards of runs with BOLD are what they always were, to the byte
                del sample["wanted"]
            for place in sample["arrays"].values():
                if not place["hashes"] or not with_hashes:
                    del place["hashes"]
        for skipped in content["skipped"]:
            if not skipped["subject"]:
                del skipped["subject"]
        if not content["dropped_parcels"]:
            del content["dropped_parcels"]
        return json.dumps({"format": FORMAT, "sha256": _digest(content), **content}, indent=1) + "\n"

    @cached_property
    def digests(self) -> frozenset[str]:
        """The SHA-256 of manifest.json as it is, and as it was before there were hashes: of the very same shards."""
        as_stored = self if self.stored_subjects is None else replace(self, subjects=self.stored_subjects)
        before = as_stored._text(with_hashes=False)
        return frozenset({self.digest, hashlib.sha256(before.encode()).hexdigest()})

    @classmethod
    def load(cls, folder: str | Path) -> Manifest:
        """Read a folder's manifest and compare the statistics beside it with their checksum.

        Raises:
            InputError: as `read`, or statistics that differ.
        """
        manifest = cls.read(folder)
        check_file(Path(folder), manifest.statistics, full=True)
        return manifest

    @classmethod
    def read(cls, folder: str | Path) -> Manifest:
        """Read a folder's manifest and nothing else.

        Raises:
            InputError: no manifest, not JSON, another format, or edited since it was written.
        """
        folder = Path(folder)
        path = folder / MANIFEST
        content, digest = _read(path)
        claimed = content.pop("sha256", None)
        written = content.pop("format", None)
        if written != FORMAT:
            raise InputError(path, "format", found=written, expected=FORMAT, fix="Build the shards again.")
        if _digest(content) != claimed:
            raise InputError(
                path,
                "edited since it was written: SHA-256",
                found=_digest(content),
                expected=claimed,
                fix="Build the shards again.",
            )
        try:
            return replace(_from_json(content, folder), digest=digest)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(
                path, "not a manifest", found=repr(error), expected="one as tools/make_shards.py writes it"
            ) from error


def content_hashes(name: str, array: np.ndarray) -> tuple[str, ...]:
    """What tells the content of an array from others: one hash of a stream, of `bold` one for each row of its subjects.

    The first 32 hexadecimal digits of the SHA-256 of the bytes as stored (C order). They depend on nothing else: not on
    the tar, nor on what else lies in it.
    """
    parts = list(array) if name == BOLD else [array]
    return tuple(hashlib.sha256(np.ascontiguousarray(part).data).hexdigest()[:32] for part in parts)


def array_moments(name: str, array: np.ndarray, present: Sequence[str], subjects: Sequence[str]) -> Moments:
    """Moments of one run's array as stored; those of `bold` per subject of `subjects`, count 0 where one is absent."""
    if name != BOLD:
        return Moments.of(array)
    rows = iter(array)
    nothing = np.zeros(array.shape[-1])
    absent = Moments(np.asarray(0, np.int64), nothing, nothing)
    return Moments.stack([Moments.of(next(rows)) if label in present else absent for label in subjects])


def write_statistics(folder: Path, moments: Mapping[str, Moments]) -> FileRecord:
    """Write the moments of all runs (R first), by name of stream or `bold`, and describe the file."""
    tensors = {
        f"{f.name}:{name}": np.ascontiguousarray(getattr(m, f.name)) for name, m in moments.items() for f in fields(m)
    }
    (folder / STATISTICS).write_bytes(save(tensors))
    return describe_file(folder / STATISTICS)


def describe_file(path: Path) -> FileRecord:
    """Name, size and SHA-256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileRecord(path.name, path.stat().st_size, digest)


def check_file(folder: Path, record: FileRecord, *, full: bool = False) -> None:
    """Compare a file's size, and with `full` its SHA-256, with its record. Raises InputError."""
    path = folder / record.name
    if not path.is_file():
        raise InputError(path, "missing", expected="a file, since the manifest lists it", fix="Build the shards again.")
    if path.stat().st_size != record.size:
        raise InputError(path, "size", found=f"{path.stat().st_size} bytes", expected=f"{record.size} bytes")
    if full and (found := describe_file(path).sha256) != record.sha256:
        raise InputError(path, "SHA-256", found=found, expected=record.sha256)


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _read(path: Path) -> tuple[dict[str, Any], str]:
    """The content of manifest.json, and the SHA-256 of the file."""
    try:
        written = path.read_bytes()
        content = json.loads(written)
    except OSError as error:
        raise InputError(
            path, f"cannot be read: {error.strerror}", expected="a folder that tools/make_shards.py wrote"
        ) from error
    except ValueError as error:
        raise InputError(path, f"not valid JSON: {error}", fix="Build the shards again.") from error
    if not isinstance(content, dict):
        raise InputError(path, "the file", found=type(content).__name__, expected="a JSON object")
    return content, hashlib.sha256(written).hexdigest()


def location_from_json(content: Mapping[str, Any]) -> ArrayLocation:
    """An address as it was written to JSON, by any version."""
    return ArrayLocation(content["offset"], tuple(content["shape"]), content["dtype"], tuple(content.get("hashes", ())))


def _from_json(content: dict[str, Any], folder: Path) -> Manifest:
    samples = tuple(
        Sample(
            **{
                **s,
                "subjects": tuple(s["subjects"]),
                "arrays": {name: location_from_json(place) for name, place in s["arrays"].items()},
            }
        )
        for s in content["samples"]
    )
    return Manifest(
        **{
            **content,
            "subjects": tuple(content["subjects"]),
            "streams": tuple(Stream(**s) for s in content["streams"]),
            "samples": samples,
            "shards": tuple(FileRecord(**s) for s in content["shards"]),
            "skipped": tuple(Skipped(**s) for s in content.get("skipped", ())),
            "dropped_parcels": tuple(content.get("dropped_parcels", ())),
            "statistics": FileRecord(**content["statistics"]),
        },
        folder=folder,
    )
