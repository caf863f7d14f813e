"""Pearson r per subject and parcel, in one pass over batches.

BOLD of 65 hours does not fit next to a model, so r is built from running means and co-moments that merge exactly
(Chan, Golub and LeVeque 1983, pairwise update), in float64: the result does not depend on how the TRs were cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Correlation:
    """r of every subject and parcel.

    r: (S, V) float64; 0 where the BOLD or the prediction is constant; NaN for a subject without TRs, and where a
        prediction is not a number.
    n_trs: (S,) TRs of each subject.
    n_constant: entries of r that are 0 because something was constant.
    """

    r: np.ndarray
    n_trs: np.ndarray
    n_constant: int

    @property
    def per_subject(self) -> np.ndarray:
        """(S,) mean r over parcels; NaN for a subject without TRs."""
        return self.r.mean(axis=1)

    @property
    def present(self) -> np.ndarray:
        """(S,) whether a subject has TRs."""
        return self.n_trs > 0

    @property
    def overall(self) -> float:
        """Mean over parcels, then over the subjects that have TRs; NaN where none has."""
        return float(self.per_subject[self.present].mean()) if self.present.any() else float("nan")


class PearsonR:
    """Accumulates prediction and BOLD; `compute` gives r over all TRs seen."""

    def __init__(self, n_subjects: int, n_parcels: int) -> None:
        shape = (n_subjects, n_parcels)
        self.n = np.zeros(n_subjects, dtype=np.int64)
        self.mean_x, self.mean_y = np.zeros(shape), np.zeros(shape)
        self.xx, self.yy, self.xy = np.zeros(shape), np.zeros(shape), np.zeros(shape)

    def update(self, prediction: Tensor, bold: Tensor, valid: Tensor) -> None:
        """Take in TRs of any number of windows.

        Args:
            prediction, bold: (B, S, T, V).
            valid: (B, S, T) bool; what stands where it is false is not read.
        """
        for subject in range(len(self.n)):
            rows = valid[:, subject].cpu()
            x = prediction[:, subject].detach().to("cpu", torch.float64)[rows].numpy()
            y = bold[:, subject].to("cpu", torch.float64)[rows].numpy()
            if len(x):
                self._merge(subject, *_moments(x, y))

    def merge(self, other: PearsonR) -> None:
        """Take in all that another accumulator has seen (another rank, say)."""
        for s in range(len(self.n)):
            self.merge_subject(s, other, s)

    def merge_subject(self, s: int, other: PearsonR, row: int) -> None:
        """Take in, for one subject, what another accumulator has seen in a row."""
        if other.n[row]:
            sums = (other.mean_x[row], other.mean_y[row], other.xx[row], other.yy[row], other.xy[row])
            self._merge(s, int(other.n[row]), *sums)

    def _merge(
        self, s: int, n: int, mean_x: np.ndarray, mean_y: np.ndarray, xx: np.ndarray, yy: np.ndarray, xy: np.ndarray
    ) -> None:
        before, total = int(self.n[s]), int(self.n[s]) + n
        dx, dy = mean_x - self.mean_x[s], mean_y - self.mean_y[s]
        weight = before * n / total
        self.xx[s] += xx + dx * dx * weight
        self.yy[s] += yy + dy * dy * weight
        self.xy[s] += xy + dx * dy * weight
        self.mean_x[s] += dx * (n / total)
        self.mean_y[s] += dy * (n / total)
        self.n[s] = total

    def compute(self) -> Correlation:
        """r over everything seen so far."""
        constant = is_constant(self.xx, self.mean_x, self.n) | is_constant(self.yy, self.mean_y, self.n)
        constant &= np.isfinite(self.xy)  # what is not a number shows, even where it is set against zeros
        with np.errstate(divide="ignore", invalid="ignore"):
            r = self.xy / np.sqrt(self.xx * self.yy)
        r[constant] = 0.0
        present = self.n > 0
        r[~present] = np.nan
        return Correlation(r=r, n_trs=self.n.copy(), n_constant=int(constant[present].sum()))


def merged(parts: Sequence[PearsonR]) -> PearsonR:
    """All that some accumulators (at least one) have seen, taken in one after the other."""
    whole = PearsonR(*parts[0].mean_x.shape)
    for part in parts:
        whole.merge(part)
    return whole


def _moments(x: np.ndarray, y: np.ndarray) -> tuple[int, np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Count, means and centred second moments of x and y (n, V)."""
    mean_x, mean_y = x.mean(axis=0), y.mean(axis=0)
    x, y = x - mean_x, y - mean_y
    return len(x), mean_x, mean_y, (x * x).sum(axis=0), (y * y).sum(axis=0), (x * y).sum(axis=0)


def is_constant(second_moment: np.ndarray, mean: np.ndarray, n: np.ndarray) -> np.ndarray:
    """Whether a series varies by no more than the rounding of float32 values around its mean.

    Shapes: second_moment (sum of squares around the mean), mean (N, V), count n (N,) -> (N, V).
    """
    rounding = (np.finfo(np.float32).eps * np.abs(mean)) ** 2 * np.maximum(n, 1)[:, None] / 4
    return second_moment <= rounding
