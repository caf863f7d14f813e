"""From a survey of the HDF5 files to a folder of shards: align, check the values, write.

Which run goes into which tar follows from the survey alone; each tar can then be written on its own, by any process,
with one run in memory at a time. So the bytes do not depend on who writes, and a finished tar can be kept over a
restart. The folder is built aside under another name and renamed when it is whole.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from trainer import __version__
from trainer.data.arrays import read_bold, read_features
from trainer.data.casts import Stored, check_rounding, remarks, rounded_away
from trainer.data.layout import Layout
from trainer.data.manifest import (
    BOLD,
    FORMAT,
    Manifest,
    Moments,
    Sample,
    Skipped,
    Stream,
    array_moments,
    describe_file,
    write_statistics,
)  # fmt: skip
from trainer.data.ranks import Crew
from trainer.data.runs import RunPlan, Source, StreamRequest
from trainer.data.shards import SampleContent, extension, write_shard
from trainer.data.survey import Survey
from trainer.data.unfinished import ShardResult, WorkFolder, new_folder
from trainer.errors import InputError
from trainer.progress import Tick, silent


def deal(runs: Sequence[RunPlan], streams: Sequence[Stream], shard_bytes: int) -> list[list[RunPlan]]:
    """Runs of each tar, in order: as many as fit into `shard_bytes`, one at least. Depends on the survey only."""
    dealt: list[list[RunPlan]] = []
    filled = 0
    for run in runs:
        size = 4 * run.n_trs * sum(source.shape[1] for source in run.bold.values())
        size += sum(run.n_trs * int(np.prod(s.row)) * np.dtype(s.dtype).itemsize for s in streams)
        if not dealt or filled + size > shard_bytes:
            dealt.append([])
            filled = 0
        dealt[-1].append(run)
        filled += size
    return dealt


@dataclass(frozen=True)
class Job:
    """What every tar of a build has in common: where it goes, and how runs are stored."""

    folder: WorkFolder
    layout: Layout
    streams: tuple[Stream, ...]
    requests: tuple[StreamRequest, ...]
    skip_bad: bool
    parcels: int


def build_shard(job: Job, index: int, runs: Sequence[RunPlan], tick: Tick | None) -> ShardResult:
    """Write one whole tar and its record, or take the one that an earlier start finished.

    Args:
        tick: called with the key of each run; None on a rank that does not show progress.

    Raises:
        InputError: what the survey could not see: values. With `job.skip_bad` such a run is left out instead.
        Abandoned: the folder is gone, since another rank has failed.
    """
    name = f"shard-{index:05d}"
    result = job.folder.finished(name)
    if result is None:
        result = _write(job, job.folder.shards / f"{name}.tar", runs, tick)
        job.folder.finish(name, result)
    elif tick:
        for run in runs:
            tick(run.key)
    return result


class Abandoned(Exception):
    """The build has ended without this rank."""


@dataclass(frozen=True)
class _Read:
    """One run as it will be stored: its good scans by subject, its streams by name, and the scans that are bad."""

    run: RunPlan
    scans: Mapping[str, Stored]
    features: Mapping[str, Stored]
    skipped: Sequence[Skipped]

    def arrays(self, parcels: int) -> dict[str, np.ndarray]:
        """By name, as they go into the tar."""
        scans = [scan.array for scan in self.scans.values()]
        bold = np.stack(scans) if scans else np.zeros((0, self.run.n_trs, parcels), np.float32)
        return {BOLD: bold, **{name: stream.array for name, stream in self.features.items()}}

    def casts(self) -> dict[str, Moments]:
        """Moments of the values before each cast that may round, and of its error, by `values:NAME` and `error:NAME`.

        The name of BOLD is that of `_bold_of`.
        """
        parts = {_bold_of(label): scan for label, scan in self.scans.items()} | dict(self.features)
        values = {f"values:{name}": part.values for name, part in parts.items() if part.values is not None}
        return values | {f"error:{name}": part.error for name, part in parts.items() if part.error is not None}

    def remarks(self) -> list[tuple[str, str]]:
        """What is odd about the run, for people to read, each with the run's key."""
        parts = [(_bold_of(label), scan, True) for label, scan in self.scans.items()]
        parts += [(name, stream, False) for name, stream in self.features.items()]
        return [(f"{name}: {each}", self.run.key) for name, part, bold in parts for each in remarks(part.array, bold)]


def _write(job: Job, path: Path, runs: Sequence[RunPlan], tick: Tick | None) -> ShardResult:
    subjects = list(job.layout.subjects)
    moments: list[Mapping[str, Moments]] = []
    casts: list[Mapping[str, Moments]] = []
    skipped: list[Skipped] = []
    notes: list[tuple[str, str]] = []

    def contents() -> Iterator[SampleContent]:
        for run in runs:
            if not path.parent.is_dir():
                raise Abandoned(path)
            try:
                read = _read(job, run)
            except InputError as error:
                if not job.skip_bad:
                    raise
                skipped.append(Skipped(run.key, str(error)))
            else:
                arrays = read.arrays(job.parcels)
                moments.append({n: array_moments(n, array, list(read.scans), subjects) for n, array in arrays.items()})
                casts.append(read.casts())
                skipped.extend(read.skipped)
                notes.extend(read.remarks())
                yield SampleContent(run.key, _meta(read.run, job.layout, job.streams), arrays)
            if tick:
                tick(run.key)

    places = write_shard(path, contents())
    if not moments:
        path.unlink()
        return ShardResult(None, {}, {}, skipped)
    return ShardResult(describe_file(path), places, _stacked(moments), skipped, _stacked(casts), notes)


def _stacked(parts: Sequence[Mapping[str, Moments]]) -> dict[str, Moments]:
    """By name, the moments of those runs that have any, along a new first axis."""
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: Moments.stack([part[name] for part in parts if name in part]) for name in names}


def _read(job: Job, run: RunPlan) -> _Read:
    """Read a run. With `job.skip_bad` a scan with something wrong is left out, as long as another one is good."""
    scans: dict[str, Stored] = {}
    errors: dict[str, InputError] = {}
    for label in (label for label in job.layout.subjects if label in run.bold):
        try:
            scans |= read_bold(run, [label])
        except InputError as error:
            if not job.skip_bad:
                raise
            errors[label] = error
    if errors and not scans:
        raise next(iter(errors.values()))
    pooled = {request.name: request.pool for request in job.requests}
    features = {stream.name: read_features(run, stream, pooled[stream.name]) for stream in job.streams}
    good = replace(run, bold={label: run.bold[label] for label in scans})
    return _Read(good, scans, features, [Skipped(run.key, str(error), label) for label, error in errors.items()])


def _meta(run: RunPlan, layout: Layout, streams: Sequence[Stream]) -> dict[str, object]:
    return {
        "series": run.series, "run": run.run, "repeat": run.repeat, **asdict(run.groups), "n_trs": run.n_trs,
        "tr": layout.tr, "subjects": [label for label in layout.subjects if label in run.bold],
        "streams": {extension(stream.name): stream.name for stream in streams},
    }  # fmt: skip


def build(
    layout: Layout, found: Survey, requests: Sequence[StreamRequest], out: Path, *,
    shard_bytes: int = 256 * 2**20, overwrite: bool = False, skip_bad: bool = False,
    tick: Tick = silent, crew: Crew | None = None, warn: Callable[[str], None] = silent,
) -> Manifest:  # fmt: skip
    """Write the whole folder `out`; it appears when it is complete, or not at all.

    Args:
        shard_bytes: a tar is filled up to this size.
        skip_bad: leave scans and runs with bad values out and list them in the manifest.
        tick: called with the key of each finished run.
        warn: told what is odd about the data, but may be right.
        crew: the processes that write tars; the bytes do not depend on how many they are.
    """
    dealt = deal(found.runs, found.streams, shard_bytes)
    request = _digest(layout, found, requests, shard_bytes, skip_bad)

    def finished(index: int) -> None:
        for run in dealt[index]:
            tick(run.key)

    with new_folder(out, overwrite, request) as folder:
        job = Job(folder, layout, found.streams, tuple(requests), skip_bad, found.parcels)
        tasks = [(job, i, runs) for i, runs in enumerate(dealt)]
        results = (crew or Crew()).run(build_shard, tasks, tick, finished)
        notes = check_casts(found, results)
        _manifest(layout, found, dealt, results, folder.shards).save(folder.shards)
    for note in [*_by_remark(results), *notes]:
        warn(note)
    return Manifest.load(out)


def _by_remark(results: Sequence[ShardResult]) -> list[str]:
    """Each remark once, with the runs that it is about."""
    runs: dict[str, list[str]] = {}
    for what, run in (note for result in results for note in result.notes):
        runs.setdefault(what, []).append(run)
    return [
        f"{what} in {len(keys)} run(s): {', '.join(keys[:3])}{', ...' * (len(keys) > 3)}" for what, keys in runs.items()
    ]


def check_casts(found: Survey, results: Sequence[ShardResult]) -> list[str]:
    """Remarks about columns that casts have rounded away, judged over all runs, however many tars and ranks there were.

    Raises:
        InputError: too many columns of a stream, or of a subject's BOLD; all such streams are named.
    """
    dtypes = {stream.name: stream.dtype for stream in found.streams}
    sources: dict[str, Source] = {}
    for run in reversed(found.runs):
        sources |= {_bold_of(label): source for label, source in run.bold.items()} | dict(run.features)
    harms = {}
    for name in sources:
        values, error = (_all_runs(results, f"{part}:{name}") for part in ("values", "error"))
        if values is not None and error is not None:
            harms[name] = rounded_away(values, error)
    half = [name for name, harm in harms.items() if dtypes.get(name) == "float16" and harm.is_too_much]
    notes = []
    for name, harm in harms.items():
        fix = "Write the numbers in another unit, without their means."
        if dtypes.get(name) == "float16":
            fix = f"Store as float32: --float32 {' '.join(half if harm.is_too_much else [name])}"
        notes += check_rounding(f"{name} (e.g. {sources[name]})", dtypes.get(name, "float32"), harm, fix)
    return notes


def _bold_of(label: str) -> str:
    """What a subject's BOLD is called beside the streams; their names have a slash, which labels have not."""
    return f"BOLD of subject {label}"


def _all_runs(results: Sequence[ShardResult], name: str) -> Moments | None:
    parts = [result.casts[name] for result in results if name in result.casts]
    return Moments.concatenate(parts) if parts else None


def _digest(layout: Layout, found: Survey, requests: Sequence[StreamRequest], shard_bytes: int, skip_bad: bool) -> str:
    """Of all that decides about the bytes: layout, options, and the names, sizes and times of the source files."""
    sources = (s for run in found.runs for s in (*run.bold.values(), *run.features.values()))
    stats = {str(path): path.stat() for path in sorted({source.file for source in sources})}
    content = {
        "format": [FORMAT, __version__],
        "layout": layout.model_dump(),
        "survey": asdict(found),
        "requests": [asdict(request) for request in requests],
        "options": [shard_bytes, skip_bad],
        "files": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()},
    }
    return hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()


def _manifest(
    layout: Layout, found: Survey, dealt: Sequence[Sequence[RunPlan]], results: Sequence[ShardResult], folder: Path
) -> Manifest:
    """Describe what was written; a tar of which every run was left out is not there, and does not count."""
    written = [(runs, result) for runs, result in zip(dealt, results, strict=True) if result.record is not None]
    skipped = (*found.skipped, *(s for result in results for s in result.skipped))
    if not written:
        raise InputError("--skip-bad", "no run is left", fix=f"The first: {skipped[0].reason}")
    gone = {(each.run, each.subject) for each in skipped}
    present = {
        run.key: tuple(label for label in layout.subjects if label in run.bold and (run.key, label) not in gone)
        for runs, _ in written
        for run in runs
    }
    samples = [
        Sample(
            run.key, i, run.series, run.run, run.repeat, run.groups.season, run.groups.episode, run.groups.film,
            run.groups.part, run.n_trs, present[run.key], result.places[run.key], run.wanted,
        )
        for i, (runs, result) in enumerate(written)
        for run in runs
        if run.key in result.places
    ]  # fmt: skip
    for label in {label for run in found.runs for label in run.bold}.difference(*(s.subjects for s in samples)):
        reason = next(each.reason for each in skipped if each.subject in (label, ""))
        raise InputError("--skip-bad", f"no good scan is left of subject {label}", fix=f"The first: {reason}")
    names = written[0][1].moments
    moments = {name: Moments.concatenate([result.moments[name] for _, result in written]) for name in names}
    return Manifest(
        layout.name, layout.tr, tuple(layout.subjects), found.parcels, found.streams, tuple(samples),
        tuple(result.record for _, result in written if result.record), write_statistics(folder, moments), folder,
        skipped, found.dropped,
    )  # fmt: skip
