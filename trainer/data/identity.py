"""What a stage was trained and validated on, by content: the one place that decides whether shards still hold it.

A stage writes down at its start which TRs of which runs it uses, whose BOLD and which streams, each with the hash of
its content (`content_hashes` in the manifest). Whoever opens shards for that stage later (a resume, the stage 2 around
it, scores, predictions) compares. What the stage has used must be there and be the same; what else the shards hold, or
have come to hold since, is free: further runs, streams and people.

Shards built before there were hashes, and stages that started before there was a record, can be told from others by the
SHA-256 of the whole manifest only. Where that differs too, nothing says whether the data are the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainer.config import Filter
from trainer.data.manifest import BOLD, Manifest, Sample, Stream
from trainer.data.plan import Span
from trainer.errors import InputError

TAR = "tar:"
LISTED = 3
"""Differences that a message names; of the others it says how many there are."""


@dataclass(frozen=True)
class Showing:
    """One showing of a run as far as it was used: subject label -> hash of the BOLD, stream -> hash of the features.

    A hash is empty where the shards had none.
    """

    series: str
    run: str
    repeat: int
    n_trs: int
    bold: Mapping[str, str]
    features: Mapping[str, str]

    @property
    def arrays(self) -> dict[tuple[str, str], str]:
        """The hashes of all that is used: those of BOLD by (`bold`, label), those of streams by (name, "")."""
        bold = {(BOLD, label): used for label, used in self.bold.items()}
        return bold | {(name, ""): used for name, used in self.features.items()}

    def __str__(self) -> str:
        return f"{self.series}/{self.run}" + (f" (showing {self.repeat})" if self.repeat > 1 else "")


@dataclass(frozen=True)
class Piece:
    """TRs [start, stop) of the showing of that number, with the BOLD of some subjects."""

    showing: int
    start: int
    stop: int
    subjects: tuple[str, ...]


@dataclass(frozen=True)
class UsedSet:
    """The pieces of a set, and the filter that chose them, without its subjects."""

    filter: Mapping[str, Any]
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class DataRecord:
    """What a stage uses of a folder of shards.

    Attributes:
        name, tr: of the data; the TR in seconds.
        manifest: SHA-256 of manifest.json.
        subjects: labels, in the order of the stage's subject axis.
        parcels: how many; None in the record of a stage that wrote none (see `unrecorded`).
        streams: those that it reads, in its order.
        showings: the runs that it uses.
        sets: the sets that it learns from or validates on, by name.
    """

    name: str
    tr: float
    manifest: str
    subjects: tuple[str, ...]
    parcels: int | None
    streams: tuple[Stream, ...]
    showings: tuple[Showing, ...]
    sets: Mapping[str, UsedSet]

    def as_json(self) -> dict[str, Any]:
        """Plain lists, dicts and numbers."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> DataRecord:
        """The record of `as_json`. Raises KeyError, TypeError or AttributeError for something else."""
        sets = {
            name: UsedSet(s["filter"], tuple(Piece(**{**p, "subjects": tuple(p["subjects"])}) for p in s["pieces"]))
            for name, s in content["sets"].items()
        }
        return cls(
            **{
                **content,
                "subjects": tuple(content["subjects"]),
                "streams": tuple(Stream(**stream) for stream in content["streams"]),
                "showings": tuple(Showing(**showing) for showing in content["showings"]),
                "sets": sets,
            }
        )

    def spans(self, set_name: str, chosen: Filter, manifest: Manifest) -> list[Span] | None:
        """The spans that the stage used of a set, with the BOLD of the subjects that `chosen` takes, in its order.

        None where it did not use such a set, or the filter now is another one.
        """
        used = self.sets.get(set_name)
        if used is None or dict(used.filter) != _given(chosen):
            return None
        places = _places(manifest)
        numbers = [places.get((s.series, s.run, s.repeat)) for s in self.showings]
        spans = []
        for piece in used.pieces:
            taken = [label for label in piece.subjects if chosen.subjects is None or label in chosen.subjects]
            number = numbers[piece.showing]
            if taken and number is not None:
                flags = tuple(label in taken for label in manifest.subjects)
                spans.append(Span(number, piece.start, piece.stop, flags))
        return spans


@dataclass(frozen=True)
class Known:
    """A record, and the folder whose weights were made from such data."""

    where: Path
    record: DataRecord


def record_of(
    manifest: Manifest, streams: Sequence[Stream], sets: Mapping[str, tuple[Filter, Sequence[Span]]]
) -> DataRecord:
    """What a stage that starts now uses: set name -> the filter and the spans of it."""
    labels: dict[int, set[str]] = {}
    for _, spans in sets.values():
        for span in spans:
            labels.setdefault(span.sample, set()).update(_labels(span, manifest))
    samples = sorted(labels)
    showings = [_showing(manifest.samples[sample], labels[sample], streams) for sample in samples]
    used = {
        name: UsedSet(
            _given(chosen),
            tuple(Piece(samples.index(s.sample), s.start, s.stop, tuple(_labels(s, manifest))) for s in spans),
        )
        for name, (chosen, spans) in sets.items()
    }
    described = manifest.name, manifest.tr, manifest.digest, manifest.subjects, manifest.parcels
    return DataRecord(*described, tuple(streams), tuple(showings), used)


def unrecorded(manifest: str, subjects: Sequence[str]) -> DataRecord:
    """What is known of a stage that wrote no record: the digest of the manifest, and the labels of its subjects."""
    return DataRecord("", 0.0, manifest, tuple(subjects), None, (), (), {})


def check(known: Known, manifest: Manifest, shards: str, *, trains: bool) -> str | None:
    """Compare shards with what a stage has used.

    Args:
        shards: how the configuration names them.
        trains: a training is to stand on the data, so that they must be known to be the same.

    Returns: a warning where nothing says whether the data are the same; None where they are.

    Raises:
        InputError: they differ, or might where a training is to stand on them.
    """
    differing = list(differences(known.record, manifest))
    what = f"not the data that {known.where} was trained and validated on"
    if differing:
        fix = "Name the shards that it was trained on as data.shards, or train anew with another --run."
        raise InputError(shards, what, found=listed(differing), fix=fix)
    if is_certain(known.record, manifest):
        return None
    found = f"manifest {manifest.digest[:12]}"
    expected = f"{known.record.manifest[:12]}, as contents have no hashes"
    if trains:
        fix = "Continue with the shards that the training started with, or train anew with another --run."
        raise InputError(shards, f"the shards of {known.where} or others", found=found, expected=expected, fix=fix)
    return (
        f"{shards}: nothing says whether these are the data that {known.where} was trained and validated on: "
        f"found {found}, expected {expected}"
    )


def is_certain(record: DataRecord, manifest: Manifest) -> bool:
    """Whether data without `differences` are known to be the same."""
    if record.manifest in manifest.digests or not record.manifest:
        return True
    if record.parcels is None:
        return False
    places = _places(manifest)
    return all(
        used and _hash(manifest.samples[places[showing.series, showing.run, showing.repeat]], array)
        for showing in record.showings
        for array, used in showing.arrays.items()
    )


def differences(record: DataRecord, manifest: Manifest) -> Iterator[str]:
    """What of a record the shards do not hold, or hold otherwise; each in a few words."""
    if record.manifest in manifest.digests:
        return
    if record.parcels not in (None, manifest.parcels):
        yield f"{manifest.parcels} parcels instead of {record.parcels}"
    there = {stream.name: stream for stream in manifest.streams}
    for stream in record.streams:
        now = there.get(stream.name)
        if now is None:
            yield f"no stream {stream.name}"
        elif now != stream:
            yield f"{stream.name}: {_described(now)} instead of {_described(stream)}"
    stored = manifest.stored_subjects or manifest.subjects
    used = {label for showing in record.showings for label in showing.bold}
    yield from (f"no subject {label}" for label in record.subjects if label in used.difference(stored))
    places = _places(manifest)
    for showing in record.showings:
        place = places.get((showing.series, showing.run, showing.repeat))
        changed = ["missing"] if place is None else _changes(showing, manifest.samples[place])
        if changed:
            yield f"{showing}: {', '.join(changed)}"


def _changes(showing: Showing, sample: Sample) -> list[str]:
    """How a showing differs from the one that was used."""
    if sample.n_trs != showing.n_trs:
        return [f"{sample.n_trs} TRs instead of {showing.n_trs}"]
    absent = [label for label in showing.bold if label not in sample.subjects]
    other = [array for array, used in showing.arrays.items() if used and (now := _hash(sample, array)) and now != used]
    bold = [label for name, label in other if name == BOLD]
    streams = [name for name, _ in other if name != BOLD]
    changes = [f"no BOLD of subject {', '.join(absent)}"] if absent else []
    changes += [f"other BOLD of subject {', '.join(bold)}"] if bold else []
    return changes + ([f"other {', '.join(streams)}"] if streams else [])


def _hash(sample: Sample, array: tuple[str, str]) -> str:
    """The hash of a stream (name, "") or of a subject's BOLD (`bold`, label); empty where there is none."""
    name, label = array
    place = sample.arrays.get(name)
    if place is None or not place.hashes or (name == BOLD and label not in sample.subjects):
        return ""
    return place.hashes[sample.subjects.index(label) if name == BOLD else 0]


def listed(differing: Sequence[str]) -> str:
    """The first few, and how many there are besides."""
    more = len(differing) - LISTED
    return "; ".join(differing[:LISTED]) + (f"; and {more} more" if more > 0 else "")


def set_digest(manifest: Manifest, spans: Sequence[Span], streams: Sequence[Stream]) -> dict[str, str]:
    """What a set holds, as two words: `bold`, what is predicted, and `features`, from what.

    They tell a score from one that was taken on other data. Where contents have no hashes, those of the tars stand for
    them, and the word begins with `tar:`.
    """
    arrays = {
        BOLD: [[(BOLD, label) for label in _labels(span, manifest)] for span in spans],
        "features": [[(stream.name, "") for stream in streams] for _ in spans],
    }
    return {name: _digest(manifest, spans, used) for name, used in arrays.items()}


def _digest(manifest: Manifest, spans: Sequence[Span], arrays: Sequence[Sequence[tuple[str, str]]]) -> str:
    samples = [manifest.samples[span.sample] for span in spans]
    hashes = [[_hash(sample, array) for array in used] for sample, used in zip(samples, arrays, strict=True)]
    known = all(map(all, hashes))
    content = [
        [sample.series, sample.run, sample.repeat, sample.n_trs, span.start, span.stop, used,
         found if known else manifest.shards[sample.shard].sha256]
        for sample, span, used, found in zip(samples, spans, arrays, hashes, strict=True)
    ]  # fmt: skip
    return ("" if known else TAR) + _word(content)


def differ(one: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    """Which of the words of two sets, `bold` and `features`, say that their contents differ.

    Of contents without hashes nothing is said: the same runs may lie in other tars.
    """
    return [n for n in one if n in other and one[n] != other[n] and TAR not in (one[n][:4], other[n][:4])]


def features_digest(sample: Sample, streams: Sequence[Stream]) -> str:
    """The features of a run as one word; empty where their contents have no hashes."""
    hashes = [_hash(sample, (stream.name, "")) for stream in streams]
    return _word([[stream.name for stream in streams], hashes]) if all(hashes) else ""


def _word(content: object) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


def _showing(sample: Sample, labels: set[str], streams: Sequence[Stream]) -> Showing:
    bold = {label: _hash(sample, (BOLD, label)) for label in sample.subjects if label in labels}
    features = {stream.name: _hash(sample, (stream.name, "")) for stream in streams}
    return Showing(sample.series, sample.run, sample.repeat, sample.n_trs, bold, features)


def _labels(span: Span, manifest: Manifest) -> list[str]:
    return [label for label, used in zip(manifest.subjects, span.subjects, strict=True) if used]


def _places(manifest: Manifest) -> dict[tuple[str, str, int], int]:
    """Where a showing stands in the manifest."""
    return {(sample.series, sample.run, sample.repeat): i for i, sample in enumerate(manifest.samples)}


def _given(chosen: Filter) -> dict[str, Any]:
    """What a filter says of runs and TRs."""
    given = chosen.model_dump(mode="json", exclude={"subjects"})
    return {key: value for key, value in given.items() if value is not None}


def _described(stream: Stream) -> str:
    layers = f"{stream.layers} x " if stream.layers > 1 else ""
    return f"{layers}{stream.width} values ({stream.dtype})"
