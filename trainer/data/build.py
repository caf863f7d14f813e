"""From a survey of the HDF5 files to a folder of shards: align, check the values, write.

Which run goes into which tar follows from the survey alone; each tar can then be written on its own, by any process,
with one run in memory at a time. So the bytes do not depend on who writes, and a finished tar can be kept over a
restart. The folder is built aside under another name and renamed when it is whole.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from trainer import __version__
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
from trainer.data.survey import Survey, opened
from trainer.data.unfinished import ShardResult, WorkFolder, new_folder
from trainer.errors import InputError
from trainer.progress import Tick, silent


def read_bold(run: RunPlan, subjects: Sequence[str]) -> np.ndarray:
    """BOLD of the present subjects, in the order of `subjects`, cut to the run's TRs: (S present, T, V) float32.

    Raises InputError for NaN or Inf.
    """
    return np.stack([_finite(run.bold[label], run.n_trs).astype(np.float32) for label in subjects if label in run.bold])


def read_features(run: RunPlan, stream: Stream, pool: bool) -> np.ndarray:
    """A stream's rows for one run, aligned at the start and in the stored dtype: (T, D) or (T, L, D).

    Raises:
        InputError: NaN or Inf, or a value that overflows float16.
    """
    source = run.features[stream.name]
    values = _finite(source, run.n_trs)
    if values.ndim == 3 and pool:
        values = values.mean(1, dtype=np.float32 if values.dtype.itemsize < 8 else np.float64)
    values = fit_length(values.reshape(len(values), *stream.row), run.n_trs)
    with np.errstate(over="ignore"):
        stored = values.astype(stream.dtype)
    if not np.isfinite(stored).all():
        limit = float(np.finfo(stream.dtype).max)
        raise InputError(
            str(source),
            f"overflows {stream.dtype}",
            found=f"{np.abs(values).max():g}",
            expected=f"at most {limit:g}",
            fix=f"Store the stream as float32: --float32 {stream.name}" if stream.dtype == "float16" else None,
        )
    return np.ascontiguousarray(stored)


def fit_length(values: np.ndarray, n_trs: int) -> np.ndarray:
    """Cut to `n_trs` rows, or repeat the last row: features are time-locked at the start."""
    missing = n_trs - len(values)
    return values[:n_trs] if missing <= 0 else np.concatenate([values, np.repeat(values[-1:], missing, 0)])


def _finite(source: Source, n_trs: int) -> np.ndarray:
    with opened(source.file) as file:
        values: np.ndarray = file[source.dataset][:n_trs]
    finite = np.isfinite(values)
    if not finite.all():
        place = np.argwhere(~finite)[0]
        raise InputError(
            str(source),
            "not a finite number",
            found=f"{values[tuple(place)]} at TR {place[0]}, column {place[-1]}",
            expected="numbers without NaN and Inf",
            fix=f"{int((~finite).sum())} such value(s) in all.",
        )
    return values


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


def _write(job: Job, path: Path, runs: Sequence[RunPlan], tick: Tick | None) -> ShardResult:
    subjects = list(job.layout.subjects)
    moments: list[Mapping[str, Moments]] = []
    skipped: list[Skipped] = []

    def contents() -> Iterator[SampleContent]:
        for run in runs:
            if not path.parent.is_dir():
                raise Abandoned(path)
            try:
                arrays = _read_arrays(job, run)
            except InputError as error:
                if not job.skip_bad:
                    raise
                skipped.append(Skipped(run.key, str(error)))
            else:
                moments.append({n: array_moments(n, array, list(run.bold), subjects) for n, array in arrays.items()})
                yield SampleContent(run.key, _meta(run, job.layout, job.streams), arrays)
            if tick:
                tick(run.key)

    places = write_shard(path, contents())
    if not moments:
        path.unlink()
        return ShardResult(None, {}, {}, skipped)
    stacked = {name: Moments.stack([m[name] for m in moments]) for name in moments[0]}
    return ShardResult(describe_file(path), places, stacked, skipped)


def _read_arrays(job: Job, run: RunPlan) -> dict[str, np.ndarray]:
    pooled = {request.name: request.pool for request in job.requests}
    features = {stream.name: read_features(run, stream, pooled[stream.name]) for stream in job.streams}
    none = np.zeros((0, run.n_trs, job.parcels), np.float32)
    return {BOLD: read_bold(run, list(job.layout.subjects)) if run.bold else none, **features}


def _meta(run: RunPlan, layout: Layout, streams: Sequence[Stream]) -> dict[str, object]:
    return {
        "series": run.series, "run": run.run, "repeat": run.repeat, **asdict(run.groups), "n_trs": run.n_trs,
        "tr": layout.tr, "subjects": [label for label in layout.subjects if label in run.bold],
        "streams": {extension(stream.name): stream.name for stream in streams},
    }  # fmt: skip


def build(
    layout: Layout, found: Survey, requests: Sequence[StreamRequest], out: Path, *,
    shard_bytes: int = 256 * 2**20, overwrite: bool = False, skip_bad: bool = False,
    tick: Tick = silent, crew: Crew | None = None,
) -> Manifest:  # fmt: skip
    """Write the whole folder `out`; it appears when it is complete, or not at all.

    Args:
        shard_bytes: a tar is filled up to this size.
        skip_bad: leave a run with bad values out and list it in the manifest.
        tick: called with the key of each finished run.
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
        _manifest(layout, found, dealt, results, folder.shards).save(folder.shards)
    return Manifest.load(out)


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
    samples = [
        Sample(
            run.key, i, run.series, run.run, run.repeat, run.groups.season, run.groups.episode, run.groups.film,
            run.groups.part, run.n_trs, tuple(label for label in layout.subjects if label in run.bold),
            result.places[run.key], run.wanted,
        )
        for i, (runs, result) in enumerate(written)
        for run in runs
        if run.key in result.places
    ]  # fmt: skip
    names = written[0][1].moments
    moments = {name: Moments.concatenate([result.moments[name] for _, result in written]) for name in names}
    return Manifest(
        layout.name, layout.tr, tuple(layout.subjects), found.parcels, found.streams, tuple(samples),
        tuple(result.record for _, result in written if result.record), write_statistics(folder, moments), folder,
        skipped,
    )  # fmt: skip
