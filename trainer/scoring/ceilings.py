"""What bounds a score whatever the model: the noise ceiling from films that were shown twice, and how alike people are.

    RUN/ceilings/figures.json      what they are of, and their means
    RUN/ceilings/figures.npy       (S, V) noise ceiling of one run; absent where no stimulus of the set was shown twice
    RUN/ceilings/figures-isc.npy   (S, V) inter-subject correlation; absent where no two people share a run of the set

They belong to the data, so they are computed once for a run directory, by whoever scores first. Two who do so at the
same time write the same. Files of other shards, runs or scaling are replaced.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from trainer.data.batches import whole_runs
from trainer.data.plan import Span
from trainer.data.study import Study
from trainer.errors import InputError
from trainer.run.directory import StageDirectory
from trainer.run.files import read_json, write_json
from trainer.scoring.metrics import Correlation, PearsonR, merged
from trainer.scoring.records import finite, write_array
from trainer.scoring.shares import Ranks, in_order, shown

LEAST_CEILING = 0.1
"""Parcels whose ceiling is lower are left out where scores are divided by it."""


def noise_ceiling(rho: np.ndarray, n_averaged: int = 1) -> np.ndarray:
    """The r that a perfect prediction of what repeats would reach, of the same shape as rho.

    With rho the correlation of two showings, one showing holds a share rho of variance that repeats, so the ceiling is
    sqrt(rho); the average of n showings holds n rho / (1 + (n - 1) rho) (Spearman and Brown), which for two is
    2 rho / (1 + rho). Where rho is below 0 nothing repeats. NaN stays.
    """
    repeating = np.maximum(rho, 0.0)
    return np.sqrt(n_averaged * repeating / (1.0 + (n_averaged - 1) * repeating))


@dataclass(frozen=True)
class OverCeiling:
    """r over the ceiling, averaged over parcels and then over subjects; and how many parcels were too low for it."""

    mean_ceiling: float
    ratio: float
    n_below: int


def over_ceiling(r: np.ndarray, ceiling: np.ndarray, present: np.ndarray) -> OverCeiling | None:
    """Compare r (S, V) of the subjects that are `present` (S,) with the noise ceiling (S, V).

    Subjects without repeated runs do not enter. None where none is left.
    """
    known = present & ~np.isnan(ceiling).any(axis=1)
    if not known.any():
        return None
    kept = ceiling[known] >= LEAST_CEILING
    ratios = [
        float(np.mean(mine[high] / bound[high]))
        for mine, bound, high in zip(r[known], ceiling[known], kept, strict=True)
        if high.any()
    ]
    ratio = float(np.mean(ratios)) if ratios else float("nan")
    return OverCeiling(float(ceiling[known].mean()), ratio, int((~kept).sum()))


def repeats(study: Study, set_name: str) -> list[tuple[Span, Span]]:
    """Two showings of each stimulus of a set that was shown more than once, whichever of them the set's filter takes.

    The TRs are those of the set that both have, the subjects those of the set that saw both.
    """
    samples = study.manifest.samples
    found: dict[tuple[str, str], tuple[Span, Span]] = {}
    for span in study.spans[set_name]:
        sample = samples[span.sample]
        stimulus = sample.series, sample.run
        showings = [i for i, other in enumerate(samples) if (other.series, other.run) == stimulus]
        showings = sorted(showings, key=lambda i: samples[i].repeat)[:2]
        stop = min(span.stop, *(samples[i].n_trs for i in showings))
        saw = [set(samples[i].subjects) for i in showings]
        both = tuple(
            used and all(label in there for there in saw)
            for used, label in zip(span.subjects, study.manifest.subjects, strict=True)
        )
        if len(showings) == 2 and any(both) and stop > span.start:
            pair = tuple(replace(span, sample=i, stop=stop, subjects=both) for i in showings)
            found.setdefault(stimulus, (pair[0], pair[1]))
    return list(found.values())


def repeat_correlation(study: Study, pairs: Sequence[tuple[Span, Span]], processes: Ranks) -> Correlation:
    """rho (S, V), the correlation of both showings over all TRs of the pairs, on every rank; the ranks share them."""

    def correlate_share() -> list[PearsonR]:
        found = []
        for pair in shown(processes, processes.share(pairs), "ceilings", len(pairs)):
            (first, valid), (second, _) = _bold(study, pair)
            found.append(PearsonR(*first.shape[1::2]))
            found[-1].update(first, second, valid)
        return found

    return merged(in_order(processes, correlate_share)).compute()


def inter_subject_correlation(study: Study, spans: Sequence[Span], processes: Ranks) -> Correlation:
    """(S, V) correlation of each subject's BOLD with the mean of the others', over the runs that they share.

    The BOLD is scaled as the study says, so one whose BOLD varies more weighs more in the others' mean.
    """
    shared = [span for span in spans if sum(span.subjects) > 1]

    def correlate_share() -> list[PearsonR]:
        found = []
        for bold, valid in shown(processes, _bold(study, processes.share(shared)), "alike", len(shared)):
            bold = bold.double()
            others = (bold.sum(1, keepdim=True) - bold) / (int(valid[0, :, 0].sum()) - 1)  # an absent one's is 0
            found.append(PearsonR(*bold.shape[1::2]))
            found[-1].update(others, bold, valid)
        return found

    if not shared:
        return PearsonR(len(study.manifest.subjects), study.manifest.parcels).compute()
    return merged(in_order(processes, correlate_share)).compute()


def _bold(study: Study, spans: Sequence[Span]) -> Iterator[tuple[Tensor, Tensor]]:
    """BOLD (1, S, T, V) of each span, and (1, S, T) where it is there."""
    for batch in whole_runs(study.shards, spans, [], study.scaling):
        yield batch.bold, batch.subject_mask[:, :, None].expand(batch.bold.shape[:3])


def write_ceilings(directory: StageDirectory, study: Study, set_name: str, processes: Ranks) -> np.ndarray | None:
    """See that the ceilings of a set lie in the run directory of a stage; on every rank.

    Returns:
        (S, V) noise ceilings, NaN for a subject without repeated runs; None where there are none at all.

    Raises:
        InputError: on every rank, where one cannot read a shard.
    """
    path = folder_of(directory) / f"{set_name}.json"
    found: tuple[bool, np.ndarray | None] = processes.first(lambda: _read(path, study, set_name))
    if found[0]:
        return found[1]
    pairs = repeats(study, set_name)
    rho = repeat_correlation(study, pairs, processes) if pairs else None
    isc = inter_subject_correlation(study, study.spans[set_name], processes)
    ceiling = None if rho is None else noise_ceiling(rho.r)
    processes.first(lambda: _write(path, study, set_name, pairs, ceiling, isc))
    return ceiling


def folder_of(directory: StageDirectory) -> Path:
    """Where the ceilings of the run lie that a stage, or its refit, belongs to."""
    stage = directory.path.parent if directory.path.name == "refit" else directory.path
    return stage.parent / "ceilings"


def _read(path: Path, study: Study, set_name: str) -> tuple[bool, np.ndarray | None]:
    """(whether the ceilings lie there, the noise ceilings)."""
    try:
        content = read_json(path)
        if content["of"] != _fingerprint(study, set_name):
            return False, None
        return True, np.load(path.with_suffix(".npy")) if "ceiling" in content else None
    except (InputError, OSError, ValueError, KeyError, TypeError):  # missing, or half of it deleted: computed again
        return False, None


def _write(
    path: Path,
    study: Study,
    set_name: str,
    pairs: Sequence[tuple[Span, Span]],
    ceiling: np.ndarray | None,
    isc: Correlation,
) -> None:
    """The arrays first: where the .json is, they are."""
    subjects, samples = study.manifest.subjects, study.manifest.samples
    content: dict[str, Any] = {"set": set_name, "of": _fingerprint(study, set_name), "subjects": list(subjects)}
    if ceiling is None:
        path.with_suffix(".npy").unlink(missing_ok=True)
    else:
        content["repeats"] = [[samples[first.sample].key, samples[second.sample].key] for first, second in pairs]
        content["n_trs"] = sum(len(first) for first, _ in pairs)
        content["ceiling"], content["ceiling_per_subject"] = _means(ceiling, subjects)
        content["n_below_ceiling"] = int((ceiling < LEAST_CEILING).sum())
        write_array(path.with_suffix(".npy"), ceiling)
    beside = path.with_name(f"{set_name}-isc.npy")
    if isc.present.any():
        content["isc"], content["isc_per_subject"] = _means(isc.r, subjects)
        write_array(beside, isc.r)
    else:
        beside.unlink(missing_ok=True)
    write_json(path, content)


def _means(values: np.ndarray, subjects: Sequence[str]) -> tuple[float | None, dict[str, float | None]]:
    """Mean over parcels and subjects, and of each subject that has any."""
    of_subjects = {label: row.mean() for label, row in zip(subjects, values, strict=True) if not np.isnan(row).all()}
    return finite(np.mean(list(of_subjects.values()))), {label: finite(mean) for label, mean in of_subjects.items()}


def _fingerprint(study: Study, set_name: str) -> str:
    """What ceilings depend on, as one word: shards, runs and scaling."""
    scaling = study.config.bold.standardise
    fitted_to = study.spans["train"] if scaling == "subject" else None
    files = [record.sha256 for record in study.manifest.shards]
    return hashlib.sha256(repr((files, study.spans[set_name], scaling, fitted_to)).encode()).hexdigest()
