"""Whether a prediction tells films apart as the BOLD does: representational similarity (Kriegeskorte 2008).

How unlike two TRs are is 1 - r of their patterns over parcels, each parcel taken around its mean, so that it is not
the parcels' own levels that are compared. The dissimilarities of all pairs of TRs in the prediction and in the BOLD
are compared by Spearman's rho: within each run, then averaged over runs and subjects. A set of ten runs or more is
compared by runs instead, one pattern each (the mean over its TRs), unless the BOLD is z-scored within runs, where
those patterns are nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from trainer.data.study import Study
from trainer.progress import alive
from trainer.scoring.atlas import networks
from trainer.scoring.intervals import draws_runs
from trainer.scoring.metrics import PearsonR
from trainer.scoring.proper import spread_evenly
from trainer.scoring.shares import Ranks, in_order, shown

ALL = "all"
LEAST_PATTERNS = 3
"""Two patterns have but one dissimilarity, which cannot be ranked."""
TRS_OF_A_RUN = 300
TRS_OF_A_SET = 3000
"""TRs whose pairs are compared, spread evenly: at most so many of each run, and about so many of all runs."""

Groups = Mapping[str, np.ndarray]
"""Name -> indices of parcels: all of them, and those of each network."""


def groups_of(study: Study) -> Groups:
    """The groups of parcels that evaluate.labels names.

    Raises:
        InputError: a label file that cannot be read, or does not fit the parcels.
    """
    parcels, labels = study.manifest.parcels, study.config.evaluate.labels
    groups = {ALL: np.arange(parcels)}
    if labels is not None:
        names = networks(labels, parcels, study.manifest.dropped_parcels)
        groups |= {name: np.flatnonzero([other == name for other in names]) for name in dict.fromkeys(names)}
    return groups


def compares_runs(study: Study, n_runs: int) -> bool:
    """Whether runs are compared with runs; else TRs within runs."""
    return draws_runs(n_runs) and study.config.bold.standardise != "run"


def trs_of_a_run(n_trs: int, n_runs: int) -> np.ndarray:
    """The TRs of a run whose pairs are compared, in a set of so many runs."""
    return spread_evenly(n_trs, min(TRS_OF_A_RUN, max(TRS_OF_A_SET // n_runs, 2)))


def dissimilarities(patterns: np.ndarray) -> np.ndarray:
    """1 - r of all pairs of rows (N, V), each column around its mean: (N (N - 1) / 2,) float64.

    r is 0 where a row does not differ from the mean; NaN where one holds what is not a number.
    """
    values = patterns.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        rounding = (np.finfo(np.float32).eps * np.abs(values).max(axis=1)) ** 2 * values.shape[1] / 4
        values = values - values.mean(axis=0)
        values = values - values.mean(axis=1, keepdims=True)
        squares = np.square(values).sum(axis=1)
        values /= np.sqrt(squares)[:, None]
        values[squares <= rounding] = 0.0
        return (1.0 - values @ values.T)[np.triu_indices(len(values), 1)]


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1 on (N,); equal values share the mean of theirs."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    first = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))
    ends = np.append(first[1:], len(values))
    found = np.empty(len(values))
    found[order] = np.repeat((first + 1 + ends) / 2, ends - first)
    return found


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rho of (N,) values; 0 where one does not vary, NaN where one holds what is not a number."""
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return float("nan")
    a, b = (ranked - ranked.mean() for ranked in (ranks(a), ranks(b)))
    size = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / size) if size else 0.0


def similarities(prediction: np.ndarray, bold: np.ndarray, present: np.ndarray, groups: Groups) -> np.ndarray:
    """Spearman's rho (S, groups) of the dissimilarities of patterns (S, N, V); NaN for an absent subject.

    Also NaN where there are fewer than `LEAST_PATTERNS`, or a group has one parcel.
    """
    found = np.full((len(bold), len(groups)), np.nan)
    if bold.shape[1] < LEAST_PATTERNS:
        return found
    for s in np.flatnonzero(present):
        for g, parcels in enumerate(groups.values()):
            if len(parcels) > 1:
                found[s, g] = spearman(dissimilarities(prediction[s][:, parcels]), dissimilarities(bold[s][:, parcels]))
                alive()
    return found


def of_runs(runs: Sequence[PearsonR], groups: Groups, processes: Ranks) -> np.ndarray:
    """(S, groups) of the patterns of whole runs, each subject's over the runs that it has; the ranks share subjects."""

    def of_subject(s: int) -> np.ndarray:
        mine = [run for run in runs if run.n[s]]
        if not mine:
            return np.full(len(groups), np.nan)
        prediction, bold = (np.stack([getattr(run, f)[s] for run in mine])[None] for f in ("mean_x", "mean_y"))
        return similarities(prediction, bold, np.ones(1, bool), groups)[0]

    def compare_share() -> list[np.ndarray]:
        subjects = range(len(runs[0].n))
        return [of_subject(s) for s in shown(processes, processes.share(subjects), "comparing runs", len(subjects))]

    return np.stack(in_order(processes, compare_share))


def over_runs(runs: Sequence[np.ndarray], present: Sequence[np.ndarray]) -> np.ndarray:
    """The mean (S, groups) over the runs (S, groups) in which a subject is present (S,) each."""
    there = np.stack(present)[:, :, None]
    total = np.where(there, np.stack(runs), 0.0).sum(axis=0)
    return np.divide(total, there.sum(axis=0), out=np.full_like(total, np.nan), where=there.any(axis=0))


def summary(similarity: np.ndarray, present: np.ndarray, groups: Groups) -> dict[str, float]:
    """Name of the group -> mean over the subjects that are present, of (S, groups)."""
    return dict(zip(groups, map(float, similarity[present].mean(axis=0)), strict=True))
