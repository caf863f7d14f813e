"""What lies on disk against what the layout says: every run with its scans and features, before anything is written.

The survey opens every file but reads only names and shapes, so that nearly every mistake in the data is found within
seconds. What it returns is all that building needs to know.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from trainer.data.hdf5 import dataset_names, describe
from trainer.data.keys import sample_keys
from trainer.data.layout import Layout, fill, find_files
from trainer.data.manifest import Skipped, Stream
from trainer.data.runs import (
    RunPlan,
    Source,
    StreamRequest,
    common_length,
    describe_stream,
    fitting_scans,
    predicted_length,
    unlike_others,
)
from trainer.data.scans import Mistakes, Scan, find_scans
from trainer.data.shards import extension
from trainer.data.targets import find_targets
from trainer.errors import InputError
from trainer.progress import watched


@dataclass(frozen=True)
class Survey:
    """All runs of a data set, the streams as they will be stored, remarks for the user, and what is left out.

    `skipped` are runs and scans with something wrong; `dropped` are columns of the BOLD, counted from 0, that `parcels`
    does not count.
    """

    runs: tuple[RunPlan, ...]
    streams: tuple[Stream, ...]
    parcels: int
    notes: tuple[str, ...]
    skipped: tuple[Skipped, ...] = ()
    dropped: tuple[int, ...] = ()


@dataclass
class _Found:
    """What lies on disk of one series: its scans by (run, repeat), and where features are."""

    series: str
    scans: dict[tuple[str, int], Scan]
    features: Mapping[tuple[str, ...], Mapping[str, Path]]


def request_streams(
    layout: Layout, names: Sequence[str], float32: Sequence[str] = (), pool: Sequence[str] = ()
) -> tuple[StreamRequest, ...]:
    """What the layout's table says about each stream; `float32` and `pool` name streams stored otherwise than it says.

    A file that names its data sets by LAYER, or a folder named by KEY, is accepted where the table's name is absent.

    Raises:
        InputError: no stream, one named twice or unknown, two that share a file name, an option for another.
    """
    names = list(names or layout.include_features)
    if not names:
        raise InputError("--features", "no stream named", expected="KEY/LAYER, or include_features in the layout")
    for i, name in enumerate(names):
        if name in names[:i]:
            raise InputError(f"stream {name}", "named twice", expected="each stream once")
        for other in names[:i]:
            if extension(other) == extension(name):
                raise InputError(f"stream {name}", "has the same file name in the shards as", found=other)
    for option, chosen in (("--float32", float32), ("--pool", pool)):
        for name in set(chosen) - set(names):
            raise InputError(option, "not among the streams to build", found=name, expected=", ".join(names))
    requests = []
    for name in names:
        model, dataset = layout.feature(name)
        key, _, layer = name.partition("/")
        requests.append(
            StreamRequest(
                name,
                tuple(dict.fromkeys((model.folder, key))),
                tuple(dict.fromkeys((dataset, layer))),
                name in pool or model.pool == "mean",
                "float32" if name in float32 else model.dtype,
            )
        )
    return tuple(requests)


def survey(
    layout: Layout, root: Path, streams: Sequence[StreamRequest], series: Sequence[str] | None = None, *,
    skip_bad: bool = False, drop: Sequence[int] = (),
) -> Survey:  # fmt: skip
    """Find every run of the chosen series (all by default) below `root` and check names, shapes and lengths.

    With `skip_bad`, a scan that is unreadable or whose shape or length does not fit is left out, as is a run whose
    features are missing or unreadable or do not fit, or that has no good scan.

    Args:
        drop: columns of the BOLD, counted from 0, that are left out of all scans.

    Raises:
        InputError: a file or data set that is missing, cannot be read or is there twice; shapes, widths, layers or
            parcels that differ; lengths more than MAX_TRS_APART apart; a subject without any BOLD.
    """
    if not root.is_dir():
        raise InputError(root, "no such folder", expected="the folder that holds what the layout describes")
    for name in series or ():
        if name not in layout.series:
            raise InputError("--series", "unknown", found=name, expected=f"one of {', '.join(layout.series)}")
    chosen = [name for name in layout.series if series is None or name in series]
    notes: list[str] = []
    mistakes = Mistakes(skip_bad)
    dropped = tuple(sorted(set(drop)))
    found = [_find(layout, root, name, streams, notes, mistakes, dropped) for name in chosen]
    runs = _without_odd_ones(list(_plan(layout, root, found, streams, mistakes)), streams, mistakes)
    for name in series or ():
        if not mistakes.skipped and not any(run.series == name for run in runs):
            raise InputError("--series", f"no features of {name} below {root}", fix="Take it out, or add the files.")
    for label in layout.subjects:
        if not any(label in run.bold for run in runs):
            bad = next((each.reason for each in mistakes.skipped if each.subject in (label, "")), None)
            raise InputError(
                root,
                f"no BOLD file found for subject {label}" if not bad else f"no good run is left of subject {label}",
                fix=bad or "Take the subject out of the layout, or add the files.",
            )
    out = {(each.run, each.subject) for each in mistakes.skipped}
    for run in runs:
        absent = [label for label in layout.subjects if label not in run.bold and (run.key, label) not in out]
        if run.bold and absent:
            notes.append(f"{run.key}: no BOLD of subject {', '.join(absent)}")
    described = tuple(describe_stream(request, runs[0].features[request.name]) for request in streams)
    parcels = next(scan.shape[1] for run in runs for scan in run.bold.values())
    return Survey(tuple(runs), described, parcels, tuple(notes), tuple(mistakes.skipped), dropped)


def _find(
    layout: Layout, root: Path, series: str, streams: Sequence[StreamRequest], notes: list[str], mistakes: Mistakes,
    dropped: tuple[int, ...],
) -> _Found:  # fmt: skip
    scans: dict[tuple[str, int], Scan] = {}
    pattern = layout.series[series].bold
    before = len(mistakes.skipped)
    if pattern is not None:
        for label in layout.subjects:
            find_scans(layout, root, series, pattern, label, scans, notes, mistakes)
        if not scans and len(mistakes.skipped) == before:
            raise InputError(root / pattern.file, "no BOLD file found", expected=f"BOLD of {series}")
        for scan in scans.values() if dropped else ():
            scan.bold = {label: _without_columns(source, dropped) for label, source in scan.bold.items()}
    indices: dict[tuple[str, ...], dict[str, Path]] = {}
    for request in streams:
        if request.folders not in indices:
            indices[request.folders] = _feature_index(layout, root, series, request.folders)
    if pattern is None:
        _find_runs_without_bold(layout, root, series, indices.values(), scans, notes)
    return _Found(series, scans, indices)


def _without_columns(source: Source, dropped: tuple[int, ...]) -> Source:
    n_trs, columns = source.shape
    if dropped[0] < 0 or dropped[-1] >= columns or len(dropped) == columns:
        raise InputError(
            "--drop-parcels",
            f"does not fit {source}",
            found=", ".join(map(str, dropped[:9])),
            expected=f"some of the columns 0 to {columns - 1}",
        )
    return replace(source, shape=(n_trs, columns - len(dropped)), dropped=dropped)


def _plan(
    layout: Layout, root: Path, found: Sequence[_Found], streams: Sequence[StreamRequest], mistakes: Mistakes
) -> Iterator[RunPlan]:
    """All runs that have features of every stream and a good scan, or can be predicted."""
    places = [(of, run, repeat, scan) for of in found for (run, repeat), scan in sorted(of.scans.items())]
    keys = sample_keys([(of.series, run, repeat if scan.repeated else None) for of, run, repeat, scan in places])
    for key, (of, run, repeat, scan) in watched(zip(keys, places, strict=True), "surveying", len(places)):
        if scan.bad and not scan.bold:
            mistakes.note(next(iter(scan.bad.values())), key)
            continue
        for label, mistake in scan.bad.items():
            mistakes.note(mistake, key, label)
        try:
            features = {
                s.name: _feature_source(layout, root, of.series, run, s, of.features[s.folders]) for s in streams
            }
            too_far_off = fitting_scans(scan.bold, features.values()) if mistakes.skip and scan.bold else {}
            bold = {label: source for label, source in scan.bold.items() if label not in too_far_off}
            length = common_length(bold.values(), features.values()) if bold else None
            n_trs = length or predicted_length(run, scan.wanted, features.values())
        except InputError as error:
            mistakes.note(error, key)
            continue
        for label, mistake in too_far_off.items():
            mistakes.note(mistake, key, label)
        yield RunPlan(key, of.series, run, repeat, scan.groups, bold, features, n_trs, scan.wanted)


def _without_odd_ones(runs: Sequence[RunPlan], streams: Sequence[StreamRequest], mistakes: Mistakes) -> list[RunPlan]:
    """The runs without the scans and runs whose parcels or widths are not those of most."""
    odd = unlike_others(runs, streams)
    if odd and not mistakes.skip:
        raise next(iter(odd.values()))
    kept = []
    for run in runs:
        bad = {label: odd[run.key, label] for label in run.bold if (run.key, label) in odd}
        bold = {label: source for label, source in run.bold.items() if label not in bad}
        whole = odd.get((run.key, ""), None if bold or not bad else next(iter(bad.values())))
        if whole is not None:
            mistakes.note(whole, run.key)
            continue
        for label, error in bad.items():
            mistakes.note(error, run.key, label)
        n_trs = common_length(bold.values(), run.features.values()) if bad else run.n_trs
        kept.append(replace(run, bold=bold, n_trs=n_trs))
    return kept


def _find_runs_without_bold(
    layout: Layout,
    root: Path,
    series: str,
    indices: Iterable[Mapping[str, Path]],
    scans: dict[tuple[str, int], Scan],
    notes: list[str],
) -> None:
    """Add the runs of a series without BOLD to `scans`; none where nobody has extracted features of it yet."""
    described = layout.series[series]
    there = {run for index in indices for run in index if described.groups(run)}
    if not there:
        notes.append(f"{series}: no features, so it is left out")
        return
    targets = find_targets(layout, root, series, notes)
    lengths = "target_sample_number" if targets else "the features"
    notes.append(f"{series}: {len(targets or there)} run(s) without BOLD, lengths from {lengths}")
    for run in targets or there:
        groups = described.groups(run)
        if groups is None:
            raise InputError(f"series.{series}.runs", "does not fit a run of target_sample_number", found=run)
        scans[run, 1] = Scan(groups, repeated=False, wanted=targets.get(run, {}))


def _feature_index(layout: Layout, root: Path, series: str, folders: tuple[str, ...]) -> dict[str, Path]:
    """Run -> feature file of one model. One walk through its folder, whatever the number of runs."""
    series = layout.series[series].folder or series
    index: dict[str, Path] = {}
    for folder in folders:
        for pattern in layout.feature_files:
            here: dict[str, Path] = {}
            for path, fields in find_files(root, pattern, {"model": folder, "series": series}):
                other = here.setdefault(fields["run"], path)
                if other != path:
                    raise InputError(path, f"a second feature file of run {fields['run']}", found=other, expected="one")
            index = {**here, **index}
    return index


def _feature_source(
    layout: Layout, root: Path, series: str, run: str, request: StreamRequest, index: Mapping[str, Path]
) -> Source:
    if run not in index:
        known = {"model": request.folders[0], "series": layout.series[series].folder or series, "run": run}
        raise InputError(
            root / fill(layout.feature_files[0], known),
            f"no feature file of run {run} for stream {request.name}",
            expected=" or ".join(fill(pattern, known) for pattern in layout.feature_files),
        )
    names = dataset_names(index[run])
    for dataset in request.datasets:
        if dataset in names:
            return describe(index[run], dataset, (2, 3), "(TRs, D) or (TRs, L, D)")
    nearest = difflib.get_close_matches(request.datasets[0], names, n=3, cutoff=0)
    raise InputError(
        index[run],
        f"no data set {' or '.join(request.datasets)} for stream {request.name}",
        found=", ".join(nearest) + (", ..." if len(names) > len(nearest) else "") if names else "an empty file",
    )
