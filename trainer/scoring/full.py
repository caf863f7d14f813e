"""What a full scoring says of a checkpoint and a set beyond r: how sure it is, what it is run by run, what bounds it.

    "ci": [low, high], "ci_per_subject": {"1": [low, high]}, "ci_by": "blocks of 60 s" | "runs"
    "per_run": {"friends_s06e01a": r}, "per_film": {"figures": r, "season 6": r}
    "ceiling": mean, "r_over_ceiling": mean over parcels with a ceiling of at least 0.1, "n_below_ceiling": the others
    "rsa": {"all": rho, "Vis": rho}, "rsa_by": "TRs within runs" | "runs"

A key whose value is not known (no resamplings, runs too short to draw blocks from) is absent; null is not a number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trainer.data.manifest import Sample
from trainer.data.study import Study
from trainer.scoring import rsa
from trainer.scoring.ceilings import over_ceiling
from trainer.scoring.distribution import Shown
from trainer.scoring.intervals import BLOCK_S, bootstrap, can_draw, draws_runs, interval, overall_interval
from trainer.scoring.metrics import merged
from trainer.scoring.records import finite
from trainer.scoring.sets import Details, SetScores
from trainer.scoring.shares import Ranks


def details_of(study: Study, set_name: str, groups: rsa.Groups) -> Details:
    """What is kept of the runs of a set: the longest one is shown, and all are where blocks of them are drawn again.

    `groups` of parcels, in which TRs are compared unless runs are.
    """
    lengths = [len(span) for span in study.spans[set_name]]
    blocks = (
        study.config.evaluate.bootstrap > 0 and not draws_runs(len(lengths)) and can_draw(lengths, study.manifest.tr)
    )
    return Details(
        series=frozenset(range(len(lengths)) if blocks else [longest(lengths)]),
        groups=None if rsa.compares_runs(study, len(lengths)) else groups,
    )


def longest(lengths: Sequence[int]) -> int:
    """The first of the longest runs."""
    return lengths.index(max(lengths))


def resample(scores: SetScores, study: Study, set_name: str, processes: Ranks) -> dict[str, np.ndarray]:
    """Estimate -> r (B, S) of each subject in each resampling, on every rank; empty where nothing is resampled."""
    lengths = [len(span) for span in study.spans[set_name]]
    n_resamplings, tr_s = study.config.evaluate.bootstrap, study.manifest.tr
    if not n_resamplings or not can_draw(lengths, tr_s):
        return {}
    found = {}
    for estimate in scores.estimates:
        runs = [run.pairs[estimate] for run in scores.runs]
        series = None if draws_runs(len(runs)) else [run.series[estimate] for run in scores.runs]
        found[estimate] = bootstrap(set_name, n_resamplings, tr_s, runs, series, processes)
    return found


def keys_of(
    scores: SetScores,
    estimate: str,
    study: Study,
    set_name: str,
    groups: rsa.Groups,
    ceiling: np.ndarray | None,
    resampled: Mapping[str, np.ndarray],
    processes: Ranks,
) -> dict[str, Any]:
    """All that a score file says beyond r, on every rank.

    `ceiling` (S, V) and the resamplings of `resample` may be absent.
    """
    samples = [study.manifest.samples[span.sample] for span in study.spans[set_name]]
    keys = {
        **part_keys(scores, estimate, samples),
        **similarity_keys(scores, estimate, groups, processes),
        "full": True,
    }
    if estimate in resampled:
        keys |= interval_keys(scores, estimate, resampled[estimate], study.manifest.subjects)
    if ceiling is not None:
        keys |= ceiling_keys(scores, estimate, ceiling)
    return keys


def interval_keys(scores: SetScores, estimate: str, resampled: np.ndarray, subjects: Sequence[str]) -> dict[str, Any]:
    """The confidence intervals of a score file."""
    present = scores.correlations[estimate].present
    by = "runs" if draws_runs(len(scores.runs)) else f"blocks of {BLOCK_S:.0f} s"
    of_subjects = {label: interval(resampled[:, s]) for s, label in enumerate(subjects) if present[s]}
    whole = overall_interval(resampled, present)
    if whole is None:
        return {}
    return {"ci": whole, "ci_per_subject": of_subjects, "ci_by": by}


def part_keys(scores: SetScores, estimate: str, samples: Sequence[Sample]) -> dict[str, Any]:
    """r of each run, and of all runs of each film or season; `samples` are those of the runs."""
    of_runs = [run.pairs[estimate] for run in scores.runs]
    films: dict[str, list[int]] = {}
    for i, sample in enumerate(samples):
        films.setdefault(film_of(sample), []).append(i)
    return {
        "per_run": {sample.key: finite(run.compute().overall) for sample, run in zip(samples, of_runs, strict=True)},
        "per_film": {
            film: finite(merged([of_runs[i] for i in runs]).compute().overall) for film, runs in films.items()
        },
    }


def ceiling_keys(scores: SetScores, estimate: str, ceiling: np.ndarray) -> dict[str, Any]:
    """r over the noise ceiling (S, V); nothing where no subject has both."""
    correlation = scores.correlations[estimate]
    found = over_ceiling(correlation.r, ceiling, correlation.present)
    if found is None:
        return {}
    return {
        "ceiling": finite(found.mean_ceiling),
        "r_over_ceiling": finite(found.ratio),
        "n_below_ceiling": found.n_below,
    }


def similarity_keys(scores: SetScores, estimate: str, groups: rsa.Groups, processes: Ranks) -> dict[str, Any]:
    """Representational similarity of each group of parcels; runs of too few TRs to compare any have no part in it."""
    sums = [run.pairs[estimate] for run in scores.runs]
    if estimate in scores.runs[0].similarity:
        similarity = rsa.over_runs(
            [run.similarity[estimate] for run in scores.runs], [run.n >= rsa.LEAST_PATTERNS for run in sums]
        )
        by = "TRs within runs"
    else:
        similarity, by = rsa.of_runs(sums, groups, processes), "runs"
    found = rsa.summary(similarity, scores.correlations[estimate].present, groups)
    return {"rsa": {name: finite(rho) for name, rho in found.items()}, "rsa_by": by}


def shown_parcels(r: np.ndarray) -> np.ndarray:
    """(S, 2): of each row of r (S, V) the best parcel and the median one; -1 where no r is a number."""
    chosen = np.full((len(r), 2), -1)
    for s, row in enumerate(r):
        order = np.argsort(row, kind="stable")[: int(np.isfinite(row).sum())]
        if len(order):
            chosen[s] = order[-1], order[(len(order) - 1) // 2]
    return chosen


def series_of(
    scores: SetScores, study: Study, set_name: str, shown: Shown, samples: np.ndarray | None
) -> dict[str, np.ndarray]:
    """What `-series.npz` holds: BOLD and prediction (S, 2, T) of the parcels that are shown in the longest run.

    `samples` (K, S, 2, T) of the same; None where there are none. NaN for subjects without BOLD in that run.
    """
    kept = scores.runs[shown.run].series["mean"]
    n_subjects, n_trs, _ = kept.bold.shape
    bold, mean = (np.full((n_subjects, 2, n_trs), np.nan) for _ in range(2))
    for s in np.flatnonzero(kept.present):
        for place, parcel in enumerate(shown.parcels[s]):
            if parcel >= 0:
                bold[s, place], mean[s, place] = kept.bold[s, :, parcel], kept.prediction[s, :, parcel]
    sample = study.manifest.samples[study.spans[set_name][shown.run].sample]
    found = {
        "run": np.array(sample.key),
        "tr_s": np.array(study.manifest.tr),
        "parcels": shown.parcels,
        "bold": bold,
        "mean": mean,
    }
    return found if samples is None else {**found, "samples": samples}


def film_of(sample: Sample) -> str:
    """The film or season that a run belongs to; its series where the layout names neither."""
    if sample.film is not None:
        return sample.film
    return sample.series if sample.season is None else f"season {sample.season}"
