"""The submission that the Algonauts 2025 challenge takes: a zip with one .npy, a pickled dict.

    sub-01 -> {"s07e01a" -> (TRs, 1000) float32, ...}, ...

It is the one pickle that we write. How long each run has to be stands in the shards (`target_sample_number`); what was
written is read back with the restricted reader and compared with that, before the file appears under its name.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from trainer.data.keys import is_of_series
from trainer.data.manifest import Manifest, Sample
from trainer.data.study import Study
from trainer.data.targets import unpickled_npy
from trainer.errors import InputError


class Wanted:
    """What the challenge asks for.

    Attributes:
        series: the series of all runs, e.g. `friends_s7`.
        lengths: run -> subject label -> TRs.
        folders: subject label -> how the challenge calls the subject, e.g. `sub-01`.
    """

    def __init__(self, series: str, lengths: Mapping[str, Mapping[str, int]]) -> None:
        self.series, self.lengths = series, lengths
        labels = dict.fromkeys(label for by_subject in lengths.values() for label in by_subject)
        self.folders = {label: _folder(label) for label in labels}

    def shapes(self, parcels: int) -> dict[str, dict[str, tuple[int, int]]]:
        """Subject as the challenge calls it -> run -> shape of the array."""
        return {
            folder: {run: (numbers[label], parcels) for run, numbers in self.lengths.items() if label in numbers}
            for label, folder in self.folders.items()
        }


def _folder(label: str) -> str:
    if not label.isdigit():
        raise InputError("--format", "the challenge numbers its subjects", found=label, expected="a number, e.g. 1")
    return f"sub-{int(label):02d}"


def wanted_predictions(study: Study, set_name: str) -> Wanted:
    """What the challenge wants of a set.

    Raises:
        InputError: the set is not one whole series without BOLD whose lengths are known, of all subjects.
    """
    where, manifest = f"datasets.{set_name}", study.manifest
    spans = study.unseen[set_name]
    samples = [manifest.samples[span.sample] for span in spans]
    series = sorted({sample.series for sample in samples})
    if set_name in study.spans or len(series) != 1:
        found = "runs with BOLD" if set_name in study.spans else ", ".join(series)
        raise InputError(where, "no submission", found=found, expected="all runs of one series without BOLD")
    for span, sample in zip(spans, samples, strict=True):
        if len(span) != sample.n_trs:
            raise InputError(where, f"cuts {sample.run}", expected="whole runs", fix="Leave out filter.trs.")
    if manifest.dropped_parcels:
        found = f"without columns {', '.join(map(str, manifest.dropped_parcels))}"
        raise InputError(manifest.folder, "no submission: parcels were left out", found=found, expected="all parcels")
    _check_complete(where, samples, manifest, study.config.datasets[set_name].filter.subjects)
    return Wanted(series[0], {sample.run: sample.wanted for sample in samples})


def _check_complete(where: str, samples: list[Sample], manifest: Manifest, chosen: list[str] | None) -> None:
    """Every run of the series and every subject must be there, each of known length. Raises InputError."""
    series, taken = samples[0].series, {sample.key for sample in samples}
    lacking = [s.key for s in manifest.samples if s.series == series and s.key not in taken]
    lacking += [skipped.run for skipped in manifest.skipped if is_of_series(skipped.run, series)]
    if lacking:
        raise InputError(where, f"lacks run(s) of {series}", found=", ".join(lacking[:3]), expected="all of them")
    if chosen is not None and set(chosen) != set(manifest.subjects):
        expected = f"all of {', '.join(manifest.subjects)}"
        raise InputError(f"{where}.filter.subjects", "leaves some out", found=chosen, expected=expected)
    for sample in samples:
        unknown = [label for label in manifest.subjects if label not in sample.wanted]
        if unknown:
            raise InputError(
                manifest.folder,
                f"{sample.key}: nothing says how many TRs of subject {unknown[0]} are wanted",
                fix="Build the shards with a layout that names target_sample_number, and with these files there.",
            )


def write_submission(path: Path, values: Mapping[str, Mapping[str, np.ndarray]], wanted: Wanted, parcels: int) -> None:
    """Write the zip and compare what it holds with what is wanted.

    Args:
        values: run -> subject label -> (TRs, V), or (1, TRs, V) of one sample, at least as long as is wanted.

    Raises:
        InputError: something is missing, of another shape, or not a number.
    """
    content = {
        folder: {
            run: np.ascontiguousarray(values[run][label].reshape(-1, parcels)[: numbers[label]], np.float32)
            for run, numbers in wanted.lengths.items()
        }
        for label, folder in wanted.folders.items()
    }
    buffer = io.BytesIO()
    np.save(buffer, content)  # type: ignore[arg-type]
    name = f"fmri_predictions_{wanted.series}.npy"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, buffer.getvalue())
    with zipfile.ZipFile(path) as archive:
        check_submission(unpickled_npy(io.BytesIO(archive.read(name))), wanted.shapes(parcels))


def check_submission(content: Any, shapes: Mapping[str, Mapping[str, tuple[int, int]]]) -> None:
    """Compare a submission with what is wanted: subjects, runs, shapes, type, finite numbers. Raises InputError."""
    if sorted(content) != sorted(shapes):
        raise InputError("submission", "subjects", found=sorted(content), expected=sorted(shapes))
    for subject, runs in shapes.items():
        if sorted(content[subject]) != sorted(runs):
            raise InputError("submission", f"runs of {subject}", found=sorted(content[subject]), expected=sorted(runs))
        for run, shape in runs.items():
            array, where = content[subject][run], f"submission: {subject}: {run}"
            if (array.shape, array.dtype) != (shape, np.float32):
                expected = f"float32 {shape}"
                raise InputError(where, "array", found=f"{array.dtype} {array.shape}", expected=expected)
            if not np.isfinite(array).all():
                raise InputError(where, "not a finite number", found=f"{int((~np.isfinite(array)).sum())} such values")
