"""Runs as they were found, scans and features, and whether they fit together: lengths, parcels, widths.

Nothing is opened here: what is decided follows from shapes, and so do the mistakes that are named.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from trainer.data.layout import RunGroups
from trainer.data.manifest import Stream
from trainer.errors import InputError

MAX_TRS_APART = 2
"""Scans of one run differ by a TR or two, and features from the BOLD; more than that is a mistake in the data."""


@dataclass(frozen=True)
class StreamRequest:
    """A stream to build: where to look for it, and how to store it."""

    name: str
    folders: tuple[str, ...]
    datasets: tuple[str, ...]
    pool: bool
    dtype: str


@dataclass(frozen=True)
class Source:
    """One HDF5 data set; `shape` does not count the columns of the file, from 0, that are left out."""

    file: Path
    dataset: str
    shape: tuple[int, ...]
    dropped: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"{self.file}: {self.dataset}"


@dataclass(frozen=True)
class RunPlan:
    """One run and repeat with all that belongs to it; `bold` by subject label, `features` by stream.

    `wanted` says of a run without BOLD how many TRs of each subject are to be predicted, where that is known.
    """

    key: str
    series: str
    run: str
    repeat: int
    groups: RunGroups
    bold: Mapping[str, Source]
    features: Mapping[str, Source]
    n_trs: int
    wanted: Mapping[str, int] = field(default_factory=dict)


def common_length(bold: Iterable[Source], features: Iterable[Source]) -> int:
    """TRs that a run is cut to: the shortest scan. Raises InputError where lengths are more than 2 TRs apart."""
    scans = sorted(bold, key=lambda source: source.shape[0])
    shortest, longest = scans[0], scans[-1]
    n_trs = shortest.shape[0]
    if longest.shape[0] - n_trs > MAX_TRS_APART:
        raise InputError(
            str(shortest),
            "length",
            found=f"{n_trs} TRs",
            expected=f"within {MAX_TRS_APART} TRs of the {longest.shape[0]} TRs of {longest}",
        )
    for source in features:
        if not n_trs - MAX_TRS_APART <= source.shape[0] <= longest.shape[0] + MAX_TRS_APART:
            raise InputError(
                str(source),
                "length",
                found=f"{source.shape[0]} TRs",
                expected=f"within {MAX_TRS_APART} TRs of the {n_trs} TRs of the BOLD {shortest}",
                fix="Features have one row a TR, from the first TR of the run.",
            )
    return n_trs


def predicted_length(run: str, wanted: Mapping[str, int], features: Iterable[Source]) -> int:
    """TRs of a run without BOLD: the most that are wanted of a subject, else those of the shortest stream.

    Raises InputError where lengths are more than 2 TRs apart.
    """
    by_length = sorted(features, key=lambda source: source.shape[0])
    lengths = sorted(wanted.values()) or [by_length[0].shape[0]]
    if lengths[-1] - lengths[0] > MAX_TRS_APART:
        expected = f"subjects within {MAX_TRS_APART} TRs of each other"
        raise InputError("target_sample_number", f"run {run}", found=dict(wanted), expected=expected)
    for source in by_length:
        if not lengths[0] - MAX_TRS_APART <= source.shape[0] <= lengths[-1] + MAX_TRS_APART:
            of = "target_sample_number" if wanted else str(by_length[0])
            raise InputError(
                str(source),
                "length",
                found=f"{source.shape[0]} TRs",
                expected=f"within {MAX_TRS_APART} TRs of the {lengths[0]} TRs of {of}",
                fix="Features have one row a TR, from the first TR of the run.",
            )
    return lengths[-1] if wanted else lengths[0]


def unlike_others(runs: Sequence[RunPlan], requests: Sequence[StreamRequest]) -> dict[tuple[str, str], InputError]:
    """The scans whose parcels, and the runs whose widths, are not those of most data sets, with the first mistake.

    Returns: by key of the run, and subject of the scan; the subject is empty where the features are at fault.
    """
    scans = [((run.key, label), source, source.shape[1:]) for run in runs for label, source in run.bold.items()]
    bad = _odd_ones(scans, "parcels")
    for request in requests:
        sources = [((run.key, ""), run.features[request.name]) for run in runs]
        rows = [(key, source, _row(request, source)) for key, source in sources]
        bad |= _odd_ones(rows, "width")
    return bad


def fitting_scans(bold: Mapping[str, Source], features: Iterable[Source]) -> dict[str, InputError]:
    """The scans that have to be left out for the lengths of a run to fit together: as few as possible, by subject.

    Raises InputError, as `common_length`, where no scan fits.
    """
    features = list(features)
    best: list[str] = []
    mistake: InputError | None = None
    for shortest in sorted({source.shape[0] for source in bold.values()}, reverse=True):
        group = [s for s, source in bold.items() if shortest <= source.shape[0] <= shortest + MAX_TRS_APART]
        try:
            common_length([bold[label] for label in group], features)
        except InputError as error:
            mistake = mistake or error
            continue
        if len(group) > len(best):
            best = group
    if not best and mistake is not None:
        raise mistake
    longest = max((bold[label] for label in best), key=lambda source: source.shape[0])
    expected = f"within {MAX_TRS_APART} TRs of the {longest.shape[0]} TRs of {longest}"
    return {
        label: InputError(str(source), "length", found=f"{source.shape[0]} TRs", expected=expected)
        for label, source in bold.items()
        if label not in best
    }


def describe_stream(request: StreamRequest, source: Source) -> Stream:
    """The stream as it will be stored, from its data set of one run."""
    row = _row(request, source)
    return Stream(request.name, row[0] if len(row) == 2 else 1, row[-1], request.dtype)


def _odd_ones(
    described: Sequence[tuple[tuple[str, str], Source, tuple[int, ...]]], what: str
) -> dict[tuple[str, str], InputError]:
    if not described:
        return {}
    usual = Counter(shape for _, _, shape in described).most_common(1)[0][0]
    example = next(source for _, source, shape in described if shape == usual)
    odd: dict[tuple[str, str], InputError] = {}
    for key, source, shape in described:
        if shape != usual:
            expected = f"{_joined(usual)} as in {example}"
            odd.setdefault(key, InputError(str(source), what, found=_joined(shape), expected=expected))
    return odd


def _joined(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _row(request: StreamRequest, source: Source) -> tuple[int, ...]:
    """The shape of one TR as it will be stored: (D,) or (L, D)."""
    pooled = len(source.shape) == 3 and (request.pool or source.shape[1] == 1)
    return source.shape[-1:] if pooled else source.shape[1:]
