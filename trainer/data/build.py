"""From a survey of the HDF5 files to a folder of shards: align, check the values, write.

Which run goes into which tar follows from the survey alone; each tar can then be written on its own, with one run in
memory at a time. The folder is built aside under another name and renamed when it is whole.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from trainer.data.layout import Layout
from trainer.data.manifest import (
    BOLD,
    MANIFEST,
    STATISTICS,
    ArrayLocation,
    FileRecord,
    Manifest,
    Moments,
    Sample,
    Stream,
    describe_file,
    write_statistics,
)  # fmt: skip
from trainer.data.shards import SampleContent, extension, write_shard
from trainer.data.survey import RunPlan, Source, StreamRequest, Survey, opened
from trainer.errors import InputError

Report = Callable[[int, int, str], None]
"""Called as (runs written, runs in all, key of the run)."""


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


@dataclass(frozen=True)
class ShardResult:
    """A written tar: its record, where the arrays lie, and the moments of each of its runs, in order."""

    record: FileRecord
    places: Mapping[str, Mapping[str, ArrayLocation]]
    moments: Sequence[Mapping[str, Moments]]


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


def build_shard(
    path: Path, runs: Sequence[RunPlan], layout: Layout, streams: Sequence[Stream], requests: Sequence[StreamRequest],
    report: Callable[[str], None],
) -> ShardResult:  # fmt: skip
    """Write one whole tar. Raises InputError for what the survey could not see: values."""
    moments: list[Mapping[str, Moments]] = []
    pooled = {request.name: request.pool for request in requests}

    def contents() -> Iterator[SampleContent]:
        for run in runs:
            arrays = {BOLD: read_bold(run, list(layout.subjects))}
            arrays |= {stream.name: read_features(run, stream, pooled[stream.name]) for stream in streams}
            moments.append(_moments(arrays, run, list(layout.subjects)))
            yield SampleContent(run.key, _meta(run, layout, streams), arrays)
            report(run.key)

    places = write_shard(path, contents())
    return ShardResult(describe_file(path), places, moments)


def _moments(arrays: Mapping[str, np.ndarray], run: RunPlan, subjects: Sequence[str]) -> dict[str, Moments]:
    """Moments of one run's arrays as stored; `bold` per subject, count 0 where one is absent."""
    rows = iter(arrays[BOLD])
    nothing = np.zeros(arrays[BOLD].shape[-1])
    absent = Moments(np.asarray(0, np.int64), nothing, nothing)
    bold = Moments.stack([Moments.of(next(rows)) if label in run.bold else absent for label in subjects])
    return {BOLD: bold, **{name: Moments.of(array) for name, array in arrays.items() if name != BOLD}}


def _meta(run: RunPlan, layout: Layout, streams: Sequence[Stream]) -> dict[str, object]:
    return {
        "series": run.series, "run": run.run, "repeat": run.repeat, **asdict(run.groups), "n_trs": run.n_trs,
        "tr": layout.tr, "subjects": [label for label in layout.subjects if label in run.bold],
        "streams": {extension(stream.name): stream.name for stream in streams},
    }  # fmt: skip


def build(
    layout: Layout, found: Survey, requests: Sequence[StreamRequest], out: Path, *,
    shard_bytes: int = 256 * 2**20, overwrite: bool = False, report: Report = lambda done, total, key: None,
) -> Manifest:  # fmt: skip
    """Write the whole folder `out`; it appears when it is complete, or not at all."""
    done = 0

    def count(key: str) -> None:
        nonlocal done
        done += 1
        report(done, len(found.runs), key)

    with new_folder(out, overwrite) as folder:
        dealt = deal(found.runs, found.streams, shard_bytes)
        results = [
            build_shard(folder / f"shard-{i:05d}.tar", runs, layout, found.streams, requests, count)
            for i, runs in enumerate(dealt)
        ]
        manifest = _manifest(layout, found, dealt, results, folder)
        manifest.save(folder)
    return Manifest.load(out)


def _manifest(
    layout: Layout, found: Survey, dealt: Sequence[Sequence[RunPlan]], results: Sequence[ShardResult], folder: Path
) -> Manifest:
    samples = [
        Sample(
            run.key, i, run.series, run.run, run.repeat, run.groups.season, run.groups.episode, run.groups.film,
            run.groups.part, run.n_trs, tuple(label for label in layout.subjects if label in run.bold),
            result.places[run.key],
        )
        for i, (runs, result) in enumerate(zip(dealt, results, strict=True))
        for run in runs
    ]  # fmt: skip
    every = [moments for result in results for moments in result.moments]
    statistics = write_statistics(folder, {name: Moments.stack([m[name] for m in every]) for name in every[0]})
    return Manifest(
        layout.name, layout.tr, tuple(layout.subjects), found.parcels, found.streams, tuple(samples),
        tuple(result.record for result in results), statistics, folder,
    )  # fmt: skip


def check_output(out: Path, overwrite: bool) -> None:
    """Raises InputError where `out` cannot be written, holds shards already, or holds anything else."""
    above = next(p for p in (out, *out.absolute().parents) if p.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise InputError(out, "cannot be written", found=f"{above} is no folder that can be written to")
    names = sorted(p.name for p in out.iterdir()) if out.is_dir() else []
    others = [n for n in names if n not in (MANIFEST, STATISTICS) and not n.endswith(".tar")]
    if others:
        raise InputError(out, "holds other files", found=others[0], expected="a new folder, or one of shards only")
    if names and not overwrite:
        raise InputError(out, "already holds shards", fix="Add --overwrite to replace them, or choose another folder.")


@contextlib.contextmanager
def new_folder(out: Path, overwrite: bool) -> Iterator[Path]:
    """A folder beside `out` that takes its place when the block ends, and is removed when it fails."""
    check_output(out, overwrite)
    out = Path(os.path.realpath(out))
    aside, old = (out.with_name(f".{out.name}.{word}-{os.getpid()}") for word in ("building", "old"))
    created = [p for p in out.parents if not p.exists()]
    try:
        aside.mkdir(parents=True)
        yield aside
        if out.exists():
            out.rename(old)
        aside.rename(out)
    except BaseException as error:
        shutil.rmtree(aside, ignore_errors=True)
        if old.exists():
            old.rename(out)
        for parent in created:
            with contextlib.suppress(OSError):
                parent.rmdir()
        if isinstance(error, OSError):
            raise InputError(out, f"cannot be written: {error.strerror}") from error
        raise
    shutil.rmtree(old, ignore_errors=True)
