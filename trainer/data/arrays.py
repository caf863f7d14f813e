"""The arrays of one run, read from the source files: cut or lengthened to the run's TRs, checked, cast as stored."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from trainer.data import hdf5
from trainer.data.casts import Stored, stored
from trainer.data.manifest import Stream
from trainer.data.runs import RunPlan, Source
from trainer.errors import InputError


def read_bold(run: RunPlan, subjects: Sequence[str]) -> dict[str, Stored]:
    """BOLD of the present subjects, by label in the order of `subjects`, cut to the run's TRs: (T, V) float32 each.

    Raises:
        InputError: NaN or Inf, or a number that is too large.
    """
    scans = {}
    for label in (label for label in subjects if label in run.bold):
        source = run.bold[label]
        values = hdf5.read(source, run.n_trs)
        columns = np.delete(np.arange(values.shape[-1] + len(source.dropped)), source.dropped)
        _check_finite(values, source, columns, label)
        scans[label] = stored(values, "float32", str(source), columns=columns)
    return scans


def read_features(run: RunPlan, stream: Stream, pool: bool) -> Stored:
    """A stream's rows for one run, aligned at the start and in the stored dtype: (T, D) or (T, L, D).

    Raises:
        InputError: NaN or Inf, or a number that is too large, or too large for float16.
    """
    source = run.features[stream.name]
    values = hdf5.read(source, run.n_trs)
    _check_finite(values, source, np.arange(values.shape[-1]))
    if values.ndim == 3 and pool:
        with np.errstate(over="ignore"):
            values = values.mean(1, dtype=np.float32 if values.dtype.itemsize < 8 else np.float64)
    values = fit_length(values.reshape(len(values), *stream.row), run.n_trs)
    fix = f"Store the stream as float32: --float32 {stream.name}"
    return stored(values, stream.dtype, str(source), fix)


def fit_length(values: np.ndarray, n_trs: int) -> np.ndarray:
    """Cut to `n_trs` rows, or repeat the last row: features are time-locked at the start."""
    missing = n_trs - len(values)
    return values[:n_trs] if missing <= 0 else np.concatenate([values, np.repeat(values[-1:], missing, 0)])


def _check_finite(values: np.ndarray, source: Source, columns: np.ndarray, subject: str | None = None) -> None:
    """Raise InputError for NaN and Inf; of BOLD (`subject` is given) with the columns that hold nothing else.

    `columns` are the numbers of the columns in the file, counted from 0.
    """
    finite = np.isfinite(values)
    if finite.all():
        return
    place = np.argwhere(~finite)[0]
    fix = f"{int((~finite).sum())} such value(s) in all."
    if subject is not None and len(gone := columns[~finite.any(0)]):
        numbers = ",".join(map(str, gone[:9])) + (",..." if len(gone) > 9 else "")
        one = len(gone) == 1
        what = f"{'Column' if one else 'Columns'} {numbers} {'is' if one else 'are'} not finite in all TRs of subject"
        fix += f" {what} {subject}: leave {'it' if one else 'them'} out of all subjects with --drop-parcels {numbers},"
        fix += " or the scan with --skip-bad."
    raise InputError(
        str(source),
        "not a finite number",
        found=f"{values[tuple(place)]} at TR {place[0]}, column {columns[place[-1]]}",
        expected="numbers without NaN and Inf",
        fix=fix,
    )
