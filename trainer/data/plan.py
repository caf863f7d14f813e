"""Which windows make global batch k of epoch e, and which rank reads which: pure arithmetic, no file is touched.

A batch is a function of (seed, epoch, k) and the spans only. World size, workers and restarts change who reads a
window, never which windows there are, and batch k is found without going through the ones before it.

The TRs of all spans are laid end to end and cut into as many strata as an epoch has windows. A keyed permutation (a
Feistel network, after Luby and Rackoff) gives each window a stratum of its own, a counter-based hash a place in it. So
an epoch covers runs in proportion to their length, evenly, and nothing has to be shuffled or remembered.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from trainer.config import Filter
from trainer.data.manifest import Manifest, Sample
from trainer.errors import InputError

_ROUNDS = 6
_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class Span:
    """TRs [start, stop) of one sample; `subjects` says for each of the manifest's whether its BOLD is used."""

    sample: int
    start: int
    stop: int
    subjects: tuple[bool, ...]

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Window:
    """TRs [start, stop) of one sample, and the number of the window in its epoch (the key of its randomness)."""

    index: int
    sample: int
    start: int
    stop: int
    subjects: tuple[bool, ...]

    def __len__(self) -> int:
        return self.stop - self.start


def used_subjects(spans: Sequence[Span]) -> tuple[bool, ...]:
    """For each of the manifest's subjects, whether any of the spans uses its BOLD."""
    return tuple(any(used) for used in zip(*(span.subjects for span in spans), strict=True))


def select(manifest: Manifest, chosen: Filter) -> list[Span]:
    """The spans of TRs with BOLD that a filter leaves, in the manifest's order; empty where it leaves none with BOLD.

    Seasons and films are united: where either is given, a run must be in one of them. All other keys intersect. The
    TR range is a Python slice of each run; a run in which it leaves nothing is dropped, and so is one without BOLD, or
    whose present subjects are all filtered out.

    Raises:
        InputError: a value that no run has (the nearest is suggested), or nothing left, with or without BOLD.
    """
    return [span for span in _selected(manifest, chosen) if any(span.subjects)]


def select_without_bold(manifest: Manifest, chosen: Filter) -> list[Span]:
    """The spans that a filter leaves of runs that nobody has BOLD of: what can be predicted, and nothing else.

    Raises:
        InputError: as `select`.
    """
    return [span for span in _selected(manifest, chosen) if not any(span.subjects)]


def _selected(manifest: Manifest, chosen: Filter) -> list[Span]:
    _check_values(manifest, chosen)
    wanted = [chosen.subjects is None or label in chosen.subjects for label in manifest.subjects]
    spans = []
    for i, sample in enumerate(manifest.samples):
        used = tuple(want and label in sample.subjects for want, label in zip(wanted, manifest.subjects, strict=True))
        start, stop, _ = slice(*(chosen.trs or (None, None))).indices(sample.n_trs)
        if _takes(chosen, sample) and (any(used) or not sample.subjects) and start < stop:
            spans.append(Span(i, start, stop, used))
    if not spans:
        given = {key: value for key, value in chosen.model_dump().items() if value is not None}
        raise InputError("filter", "no run left", found=given, expected=f"a filter that fits {_overview(manifest)}")
    return spans


def _takes(chosen: Filter, sample: Sample) -> bool:
    united = chosen.seasons is None and chosen.films is None
    united = united or sample.season in (chosen.seasons or ()) or sample.film in (chosen.films or ())
    named = chosen.runs is None or any(_names(pattern, sample.run) for pattern in chosen.runs)
    return (
        united
        and named
        and (chosen.series is None or sample.series in chosen.series)
        and (chosen.repeats is None or sample.repeat in chosen.repeats)
    )


def _names(pattern: str, run: str) -> bool:
    """Whether a pattern of `filter.runs` means a run; a name that is spelt like the pattern is meant to the letter."""
    return run == pattern or fnmatch.fnmatchcase(run, pattern)


def _check_values(manifest: Manifest, chosen: Filter) -> None:
    """Every value of a filter must be one that the shards have: a misspelt film would be left out in silence."""
    samples = manifest.samples
    known: dict[str, Collection[object]] = {
        "series": {s.series for s in samples},
        "seasons": {s.season for s in samples if s.season is not None},
        "films": {s.film for s in samples if s.film is not None},
        "repeats": {s.repeat for s in samples},
        "subjects": set(manifest.subjects),
    }
    for key, values in known.items():
        for value in getattr(chosen, key) or ():
            if value not in values:
                nearest = difflib.get_close_matches(str(value), [str(v) for v in values], n=1)
                added = key == "subjects" and value in (manifest.stored_subjects or ())
                raise InputError(
                    f"filter.{key}",
                    "not known to the model, which was trained without this subject" if added else "not in the shards",
                    found=value,
                    expected=f"among {_listed(values)}",
                    fix=f"Did you mean {nearest[0]}?" if nearest else None,
                )
    for pattern in chosen.runs or ():
        if not any(_names(pattern, s.run) for s in samples):
            nearest = difflib.get_close_matches(pattern, sorted({s.run for s in samples}), n=1, cutoff=0)
            raise InputError("filter.runs", "no such run", found=pattern, expected=f"a run such as {nearest[0]}")


def _overview(manifest: Manifest) -> str:
    samples = manifest.samples
    parts: dict[str, Collection[object]] = {
        "series": {s.series for s in samples},
        "seasons": {s.season for s in samples} - {None},
        "films": {s.film for s in samples} - {None},
        "repeats": {s.repeat for s in samples},
        "subjects": set(manifest.subjects),
    }
    lengths = [s.n_trs for s in samples]
    there = "; ".join(f"{key} {_listed(values)}" for key, values in parts.items() if values)
    return f"{there}; runs of {min(lengths)} to {max(lengths)} TRs"


def _listed(values: Collection[object]) -> str:
    return ", ".join(sorted(map(str, values))) or "nothing"


class Plan:
    """The windows of every epoch.

    An epoch has num_samples // batch_size batches, all full. A span shorter than `sample_length` is used whole.

    Args:
        spans: what `select` gave.
        seed: of the run.
        sample_length: TRs of a window.
        num_samples: windows of an epoch.
        batch_size: windows of a global batch.
    """

    def __init__(self, spans: Sequence[Span], seed: int, sample_length: int, num_samples: int, batch_size: int) -> None:
        if not spans:
            raise ValueError("a plan needs at least one span")
        if num_samples < batch_size:
            raise InputError("num_samples", "", found=num_samples, expected=f"at least batch_size {batch_size}")
        self.spans = tuple(spans)
        self.seed, self.sample_length, self.batch_size = seed, sample_length, batch_size
        self.steps_per_epoch = num_samples // batch_size
        self.n_windows = self.steps_per_epoch * batch_size
        self._starts = np.array([span.start for span in spans], np.int64)
        self._lengths = np.array([len(span) for span in spans], np.int64)
        self._ends = np.cumsum(self._lengths)
        self._n_subjects = np.array([sum(span.subjects) for span in spans], np.int64)

    def batch(self, epoch: int, k: int) -> list[Window]:
        """Global batch k of an epoch."""
        return self._read(epoch, self._numbers(k))

    def micro_batch(self, step: int, part: Part) -> list[Window]:
        """What one rank reads for one micro-batch of global step 0, 1, ...; nothing else of the batch is computed."""
        epoch, k = divmod(step, self.steps_per_epoch)
        return self._read(epoch, micro_batches(self._numbers(k), part.rank, part.world, part.accumulation)[part.turn])

    def terms(self, step: int) -> int:
        """(subject, TR) pairs with BOLD in the whole global batch of a step: what the loss is divided by.

        Every rank knows it without asking the others, so no mean of per-rank means can slip in.
        """
        epoch, k = divmod(step, self.steps_per_epoch)
        span, start, stop = self.windows(epoch, np.asarray(self._numbers(k), np.int64))
        return int(((stop - start) * self._n_subjects[span]).sum())

    def _numbers(self, k: int) -> range:
        """The numbers in their epoch of the windows of global batch k."""
        if not 0 <= k < self.steps_per_epoch:
            raise IndexError(f"batch {k} of an epoch of {self.steps_per_epoch}")
        return range(k * self.batch_size, (k + 1) * self.batch_size)

    def _read(self, epoch: int, numbers: Sequence[int]) -> list[Window]:
        chosen, start, stop = self.windows(epoch, np.asarray(numbers, np.int64))
        return [
            Window(i, self.spans[c].sample, a, b, self.spans[c].subjects)
            for i, c, a, b in zip(numbers, chosen.tolist(), start.tolist(), stop.tolist(), strict=True)
        ]

    def windows(self, epoch: int, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Windows by their number in the epoch: index of the span, first TR and TR after the last, all int64.

        A span is met in proportion to its length, and a window starts anywhere in it with equal probability.
        """
        key = _hash(_hash(_hash(np.zeros(1, np.uint64), self.seed), epoch), 1)
        stratum = permute(np.asarray(indices), self.n_windows, key)
        jitter = (_hash(key ^ stratum.astype(np.uint64), 2) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        place = (stratum + jitter) / self.n_windows * self._ends[-1]
        span = np.minimum(np.searchsorted(self._ends, place, side="right"), len(self._ends) - 1)
        length = np.minimum(self._lengths[span], self.sample_length)
        offsets = self._lengths[span] - length + 1
        within = (place - (self._ends - self._lengths)[span]) / self._lengths[span]
        start = self._starts[span] + np.clip((within * offsets).astype(np.int64), 0, offsets - 1)
        return span, start, start + length


def _hash(values: np.ndarray, salt: int) -> np.ndarray:
    """Mix uint64 values with a number (the finaliser of SplitMix64, Steele et al. 2014). Equal on every machine."""
    golden = 0x9E3779B97F4A7C15
    x = values + np.uint64((salt * golden + golden) & _MASK)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(indices: np.ndarray, n: int, key: np.ndarray) -> np.ndarray:
    """A keyed permutation of range(n), at some indices only: (N,) int64 -> (N,) int64.

    A Feistel network permutes a power of four of at most 4 n; what falls outside range(n) is permuted again
    until it falls inside (cycle walking).
    """
    half = max((int(n - 1).bit_length() + 1) // 2, 1)
    low = np.uint64((1 << half) - 1)
    values = indices.astype(np.uint64)
    outside = np.ones(len(values), bool)
    while outside.any():
        x = values[outside]
        left, right = x >> np.uint64(half), x & low
        for turn in range(_ROUNDS):
            left, right = right, left ^ (_hash(key ^ right, 3 + turn) & low)
        values[outside] = (left << np.uint64(half)) | right
        outside = values >= n
    return values.astype(np.int64)


Item = TypeVar("Item")


@dataclass(frozen=True)
class Part:
    """Which part of a global batch: of rank `rank` of `world`, micro-batch `turn` of `accumulation`."""

    rank: int = 0
    world: int = 1
    accumulation: int = 1
    turn: int = 0


def micro_batches(windows: Sequence[Item], rank: int, world: int, accumulation: int = 1) -> list[Sequence[Item]]:
    """The micro-batches of one rank: its contiguous share of a global batch, cut into `accumulation` equal parts.

    All ranks' parts, one rank after the other, are the global batch in its order.

    Raises:
        InputError: the batch does not divide by ranks times accumulation; the numbers of ranks that fit are listed.
    """
    size, rest = divmod(len(windows), world * accumulation)
    if rest or not size:
        fitting = [w for w in range(1, len(windows) + 1) if len(windows) % (w * accumulation) == 0]
        turns = f" in {accumulation} micro-batches each" if accumulation > 1 else ""
        raise InputError(
            "batch_size",
            f"{len(windows)} windows cannot be shared by {world} processes{turns}",
            fix=f"Use one of {', '.join(map(str, fitting))} processes, or a batch_size that is a multiple of "
            f"{world * accumulation}."
            if fitting
            else f"Use a batch_size that is a multiple of {world * accumulation}.",
        )
    first = rank * accumulation
    return [windows[(first + turn) * size : (first + turn + 1) * size] for turn in range(accumulation)]
