"""How sure r is: the TRs of a set are drawn again and again, and r is taken each time.

Neighbouring TRs are alike, so what is drawn is blocks of 60 s (moving-block bootstrap: Kuensch 1989, Ann. Stat. 17,
1217), anywhere in a run and overlapping, until the run has its length again; where a set has ten runs or more, whole
runs are drawn. A resampling is a weight for each TR (or run): how often it was drawn. r follows from weighted sums,
so a thousand resamplings are a few matrix products, not a thousand passes over the BOLD.

Resampling b of a set is the same for every subject, estimate, checkpoint, configuration and number of ranks: it is
keyed by the name of the set and b. So two scores are compared resampling by resampling (`paired_difference`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trainer.errors import InputError
from trainer.progress import alive
from trainer.scoring.metrics import PearsonR, is_constant, merged
from trainer.scoring.shares import Ranks, in_order, shown

BLOCK_S = 60.0
RUNS_TO_DRAW = 10
"""Sets of at least so many runs are resampled by whole runs."""

LEVEL = 0.95
_PARCELS_AT_ONCE = 250


@dataclass(frozen=True)
class RunSeries:
    """Prediction and BOLD of one run, (S, T, V) each; `present` (S,) says whose BOLD is there."""

    prediction: np.ndarray
    bold: np.ndarray
    present: np.ndarray


def draws_runs(n_runs: int) -> bool:
    """Whether a set of so many runs is resampled by runs; else by blocks, for which the series are needed."""
    return n_runs >= RUNS_TO_DRAW


def block_trs(tr_s: float) -> int:
    """TRs in a block."""
    return max(1, round(BLOCK_S / tr_s))


def can_draw(lengths: Sequence[int], tr_s: float) -> bool:
    """Whether resamplings differ: there are runs enough to draw from, or a run that is longer than a block."""
    return draws_runs(len(lengths)) or max(lengths) > block_trs(tr_s)


def run_weights(set_name: str, n_resamplings: int, n_runs: int) -> np.ndarray:
    """(B, R) float64: how often each run is in each resampling of as many runs."""
    drawn = [_generator(set_name, b).integers(0, n_runs, n_runs) for b in range(n_resamplings)]
    return np.stack([np.bincount(runs, minlength=n_runs) for runs in drawn]).astype(np.float64)


def block_weights(set_name: str, n_resamplings: int, lengths: Sequence[int], block: int) -> list[np.ndarray]:
    """For each run (B, T) int16: how often each TR is in each resampling; each row sums to T.

    Blocks begin anywhere where they fit into the run; the last one is cut so that the run has its length.
    """
    differences = [np.zeros((n_resamplings, n_trs + 1), np.int16) for n_trs in lengths]
    for b in range(n_resamplings):
        generator = _generator(set_name, b)
        for change, n_trs in zip(differences, lengths, strict=True):
            sizes = np.full(-(-n_trs // block), min(block, n_trs))
            sizes[-1] = n_trs - sizes[:-1].sum()
            starts = generator.integers(0, n_trs - sizes + 1)
            np.add.at(change[b], starts, 1)
            np.add.at(change[b], starts + sizes, -1)
    return [change.cumsum(axis=1, dtype=np.int16)[:, :-1] for change in differences]


def _generator(set_name: str, b: int) -> np.random.Generator:
    return np.random.default_rng([b, *set_name.encode()])


class ResampledSums:
    """Weighted sums of one subject in B resamplings, around a centre (V,) of x and of y: r of each parcel.

    Around the means of the whole set the sums lose no digits, however large the means are.
    """

    def __init__(self, n_resamplings: int, centre_x: np.ndarray, centre_y: np.ndarray) -> None:
        self.centre_x, self.centre_y = centre_x, centre_y
        self.n = np.zeros(n_resamplings)
        self.sums = np.zeros((5, n_resamplings, len(centre_x)))

    def add_trs(self, weights: np.ndarray, x: np.ndarray, y: np.ndarray) -> None:
        """TRs of a run, x and y (T, V), with weights (B, T)."""
        dx, dy = x - self.centre_x, y - self.centre_y
        self._add(weights.astype(np.float64), np.ones(len(x)), (dx, dy, dx * dx, dy * dy, dx * dy))

    def add_runs(self, weights: np.ndarray, runs: Sequence[PearsonR], subject: int, parcels: slice) -> None:
        """Whole runs with weights (B, R)."""
        n = np.asarray([run.n[subject] for run in runs], np.float64)
        names = ("mean_x", "mean_y", "xx", "yy", "xy")
        mean_x, mean_y, xx, yy, xy = (np.stack([getattr(run, f)[subject, parcels] for run in runs]) for f in names)
        dx, dy, m = mean_x - self.centre_x, mean_y - self.centre_y, n[:, None]
        self._add(weights, n, (m * dx, m * dy, xx + m * dx * dx, yy + m * dy * dy, xy + m * dx * dy))

    def _add(self, weights: np.ndarray, n: np.ndarray, rows: tuple[np.ndarray, ...]) -> None:
        self.n += weights @ n
        with np.errstate(invalid="ignore"):  # what is not a number makes its parcel so in every resampling
            for total, row in zip(self.sums, rows, strict=True):
                total += weights @ row

    def r(self) -> np.ndarray:
        """(B, V); 0 where something is constant, NaN where nothing was drawn."""
        n = self.n[:, None]
        with np.errstate(divide="ignore", invalid="ignore"):
            x, y, xx, yy, xy = self.sums
            xx, yy, xy = xx - x * x / n, yy - y * y / n, xy - x * y / n
            r = xy / np.sqrt(xx * yy)
            flat = is_constant(xx, np.abs(self.centre_x) + np.abs(x / n), self.n)
            flat |= is_constant(yy, np.abs(self.centre_y) + np.abs(y / n), self.n)
        r[flat & np.isfinite(xy)] = 0.0
        return r


def bootstrap(
    set_name: str,
    n_resamplings: int,
    tr_s: float,
    runs: Sequence[PearsonR],
    series: Sequence[RunSeries] | None,
    processes: Ranks,
) -> np.ndarray:
    """(B, S): mean r over parcels of each subject in each resampling of a set, on every rank; the ranks share subjects.

    NaN: where a resampling holds none of a subject's runs; everywhere for a subject without runs, and for one whose
    prediction is not a number somewhere.

    Args:
        tr_s: seconds of a TR.
        runs: what was seen of each run.
        series: the runs themselves, where blocks are drawn (`draws_runs` is false).
    """
    whole = merged(runs)
    if series is None:
        weights = run_weights(set_name, n_resamplings, len(runs))
    else:
        lengths = [run.bold.shape[1] for run in series]
        blocks = block_weights(set_name, n_resamplings, lengths, block_trs(tr_s))

    def resampled(subject: int, parcels: slice) -> np.ndarray:
        sums = ResampledSums(n_resamplings, whole.mean_x[subject, parcels], whole.mean_y[subject, parcels])
        if series is None:
            sums.add_runs(weights, runs, subject, parcels)
            alive()
            return sums.r()
        for run, drawn in zip(series, blocks, strict=True):
            if run.present[subject]:
                x, y = (values[subject, :, parcels].astype(np.float64) for values in (run.prediction, run.bold))
                sums.add_trs(drawn, x, y)
                alive()
        return sums.r()

    def subject_mean(subject: int) -> np.ndarray:
        n_parcels = whole.mean_x.shape[1]
        total = np.zeros(n_resamplings)
        for start in range(0, n_parcels, _PARCELS_AT_ONCE):  # bounds the sums that are in memory
            total += resampled(subject, slice(start, start + _PARCELS_AT_ONCE)).sum(axis=1)
        return total / n_parcels

    subjects = range(whole.mean_x.shape[0])

    def resample_share() -> list[np.ndarray]:
        mine = shown(processes, processes.share(subjects), f"resampling {set_name}", len(subjects))
        return [subject_mean(s) for s in mine]

    return np.stack(in_order(processes, resample_share), axis=1)


def interval(values: np.ndarray) -> tuple[float, float] | None:
    """The 95 % percentile interval of resampled values (B,); None where it is not known.

    Values that are NaN because a resampling held nothing are passed over; None where all are.
    """
    found = values[np.isfinite(values)]
    if not len(found):
        return None
    low, high = np.quantile(found, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def overall_interval(resampled: np.ndarray, present: np.ndarray) -> tuple[float, float] | None:
    """The interval of the mean over the subjects of `present` (S,), from (B, S).

    None where one of them has no r that is a number: it cannot be left out without changing what the mean is of.
    """
    mine = resampled[:, present]
    if not mine.size or np.isnan(mine).all(axis=0).any():
        return None
    return interval(np.nanmean(mine, axis=1))


def paired_difference(a: np.ndarray, b: np.ndarray) -> tuple[float, float, float]:
    """How much higher score `a` is than score `b`, with the 95 % interval of the difference.

    Args:
        a, b: (B, S) each, two `-bootstrap.npy` files of one set. A subject that both lack is left out.

    Returns:
        (mean difference over the resamplings, low, high); NaN where only one of them lacks a subject.

    Raises:
        InputError: other numbers of resamplings or subjects.
    """
    if a.shape != b.shape:
        expected = "two scores of one set with the same evaluate.bootstrap"
        raise InputError("bootstrap", "the resamplings do not fit", found=f"{a.shape} and {b.shape}", expected=expected)
    lacking_a, lacking_b = np.isnan(a).all(axis=0), np.isnan(b).all(axis=0)
    kept = ~(lacking_a & lacking_b)
    if (lacking_a != lacking_b).any() or not kept.any():
        return float("nan"), float("nan"), float("nan")
    differences = np.nanmean((a - b)[:, kept], axis=1)
    limits = interval(differences)
    assert limits is not None, "each subject that is kept has values"
    return float(np.nanmean(differences)), *limits
