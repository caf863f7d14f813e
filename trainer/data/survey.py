"""What lies on disk against what the layout says: every run with its scans and features, before anything is written.

The survey opens every file but reads only names and shapes, so that nearly every mistake in the data is found within
seconds. What it returns is all that building needs to know.
"""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import h5py

from trainer.data.layout import BoldPattern, Layout, RunGroups, fill, find_files, pattern_regex
from trainer.data.manifest import Skipped, Stream
from trainer.data.runs import (
    RunPlan,
    Source,
    StreamRequest,
    common_length,
    describe_stream,
    predicted_length,
    unlike_others,
)
from trainer.data.shards import extension
from trainer.data.targets import find_targets
from trainer.errors import InputError
from trainer.progress import watched


@dataclass(frozen=True)
class Survey:
    """All runs of a data set, the streams as they will be stored, remarks for the user, and the runs left out."""

    runs: tuple[RunPlan, ...]
    streams: tuple[Stream, ...]
    parcels: int
    notes: tuple[str, ...]
    skipped: tuple[Skipped, ...] = ()


@dataclass
class _Scan:
    """One showing of one run, while it is looked for."""

    groups: RunGroups
    repeated: bool
    bold: dict[str, Source] = field(default_factory=dict)
    wanted: Mapping[str, int] = field(default_factory=dict)


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
    skip_bad: bool = False,
) -> Survey:  # fmt: skip
    """Find every run of the chosen series (all by default) below `root` and check names, shapes and lengths.

    With `skip_bad`, a run whose features are missing or unreadable, or whose shapes or lengths do not fit, is left out.

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
    bad: dict[str, InputError] = {}
    surveyed = (_survey_series(layout, root, name, streams, notes, bad if skip_bad else None) for name in chosen)
    runs = [run for series_runs in surveyed for run in series_runs]
    odd = unlike_others(runs, streams)
    if odd and not skip_bad:
        raise next(iter(odd.values()))
    bad |= odd
    runs = [run for run in runs if run.key not in bad]
    for name in series or ():
        if not bad and not any(run.series == name for run in runs):
            raise InputError("--series", f"no features of {name} below {root}", fix="Take it out, or add the files.")
    for label in layout.subjects:
        if not any(label in run.bold for run in runs):
            raise InputError(
                root,
                f"no BOLD file found for subject {label}" if not bad else f"no good run is left of subject {label}",
                fix="Take the subject out of the layout, or add the files."
                if not bad
                else str(next(iter(bad.values()))),
            )
    for run in runs:
        absent = [label for label in layout.subjects if label not in run.bold]
        if run.bold and absent:
            notes.append(f"{run.key}: no BOLD of subject {', '.join(absent)}")
    described = tuple(describe_stream(request, runs[0].features[request.name]) for request in streams)
    parcels = next(scan.shape[1] for run in runs for scan in run.bold.values())
    skipped = tuple(Skipped(key, str(error)) for key, error in bad.items())
    return Survey(tuple(runs), described, parcels, tuple(notes), skipped)


def _survey_series(
    layout: Layout, root: Path, series: str, streams: Sequence[StreamRequest], notes: list[str],
    bad: dict[str, InputError] | None,
) -> Iterator[RunPlan]:  # fmt: skip
    """The runs of one series; what is wrong with one run is raised, or goes into `bad` where that is given."""
    scans: dict[tuple[str, int], _Scan] = {}
    pattern = layout.series[series].bold
    if pattern is not None:
        for label in layout.subjects:
            _find_scans(layout, root, series, pattern, label, scans, notes)
        if not scans:
            raise InputError(root / pattern.file, "no BOLD file found", expected=f"BOLD of {series}")
    indices: dict[tuple[str, ...], dict[str, Path]] = {}
    for request in streams:
        if request.folders not in indices:
            indices[request.folders] = _feature_index(layout, root, series, request.folders)
    if pattern is None:
        _find_runs_without_bold(layout, root, series, indices.values(), scans, notes)
    keys: dict[str, str] = {}
    for (run, repeat), scan in watched(sorted(scans.items()), f"surveying {series}", len(scans)):
        key = re.sub(r"[^A-Za-z0-9_-]", "_", f"{series}_{run}") + (f"_run-{repeat}" if scan.repeated else "")
        if keys.setdefault(key, run) != run:
            raise InputError(root, "two runs have the same key", found=f"{run} and {keys[key]}", expected="other names")
        try:
            features = {s.name: _feature_source(layout, root, series, run, s, indices[s.folders]) for s in streams}
            length = common_length(scan.bold.values(), features.values()) if scan.bold else None
            n_trs = length or predicted_length(run, scan.wanted, features.values())
        except InputError as error:
            if bad is None:
                raise
            bad[key] = error
            continue
        yield RunPlan(key, series, run, repeat, scan.groups, scan.bold, features, n_trs, scan.wanted)


def _find_runs_without_bold(
    layout: Layout,
    root: Path,
    series: str,
    indices: Iterable[Mapping[str, Path]],
    scans: dict[tuple[str, int], _Scan],
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
        scans[run, 1] = _Scan(groups, repeated=False, wanted=targets.get(run, {}))


def _find_scans(
    layout: Layout,
    root: Path,
    series: str,
    pattern: BoldPattern,
    label: str,
    scans: dict[tuple[str, int], _Scan],
    notes: list[str],
) -> None:
    """Add one subject's data sets of one series to `scans`."""
    described = layout.series[series]
    found_file = False
    for path, fields in find_files(root, pattern.file, {"subject": layout.subjects[label]}):
        found_file = True
        names = _dataset_names(path)
        ignored = []
        for name in names:
            match = pattern_regex(fill(pattern.dataset, fields)).fullmatch(name)
            values = {**fields, **{k: v for k, v in (match.groupdict() if match else {}).items() if v is not None}}
            groups = described.groups(values.get("run", "")) if match else None
            if groups is None:
                ignored.append(name)
                continue
            place = (values["run"], int(values.get("repeat", 1)))
            scan = scans.setdefault(place, _Scan(groups, "repeat" in values))
            if label in scan.bold:
                raise InputError(
                    path,
                    name,
                    found=f"a second scan of run {place[0]}, repeat {place[1]}",
                    expected="one",
                    fix=f"The other is {scan.bold[label]}.",
                )
            scan.bold[label] = _source(path, name, dimensions=(2,), expected="(TRs, parcels)")
        if len(ignored) == len(names):
            raise InputError(
                path,
                "no data set of this series",
                found=", ".join(ignored[:3]) or "an empty file",
                expected=f"{pattern.dataset} with run {' or '.join(described.runs)}",
            )
        if ignored:
            notes.append(f"{path}: {len(ignored)} data set(s) are not of {series}: {', '.join(ignored[:3])}")
    if not found_file:
        notes.append(f"{series}: no BOLD file of subject {label}")


@contextlib.contextmanager
def opened(path: Path) -> Iterator[h5py.File]:
    """An HDF5 file for reading; what HDF5 cannot read becomes an InputError that names the file."""
    try:
        with h5py.File(path, "r", locking=False) as file:
            yield file
    except OSError as error:
        size = f"{path.stat().st_size} bytes" if path.exists() else "no such file (a broken link?)"
        raise InputError(
            path, "not a whole HDF5 file", found=f"{size} ({error})", fix="Download or copy it again."
        ) from error


def _dataset_names(path: Path) -> list[str]:
    names: list[str] = []
    with opened(path) as file:
        file.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
    return names


def _source(path: Path, dataset: str, dimensions: tuple[int, ...], expected: str) -> Source:
    """Describe a data set, without reading it."""
    with opened(path) as file:
        item = file[dataset]
        if item.ndim not in dimensions or 0 in item.shape:
            raise InputError(path, f"{dataset}: shape", found=item.shape, expected=expected)
        if item.dtype.kind not in "fiu":
            raise InputError(path, f"{dataset}: type", found=item.dtype, expected="numbers")
        return Source(path, dataset, tuple(item.shape))


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
    names = _dataset_names(index[run])
    for dataset in request.datasets:
        if dataset in names:
            return _source(index[run], dataset, (2, 3), "(TRs, D) or (TRs, L, D)")
    nearest = difflib.get_close_matches(request.datasets[0], names, n=3, cutoff=0)
    raise InputError(
        index[run],
        f"no data set {' or '.join(request.datasets)} for stream {request.name}",
        found=", ".join(nearest) + (", ..." if len(names) > len(nearest) else "") if names else "an empty file",
    )
