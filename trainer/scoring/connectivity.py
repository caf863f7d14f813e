"""What series of samples are like beside the real ones: functional connectivity and power spectrum.

Both are taken within each run, so that nothing depends on how runs differ in their means, and averaged over runs,
subjects and samples, each TR counting alike.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from trainer.progress import alive
from trainer.scoring.metrics import is_constant

_FIXED_POINT = 2.0**40
SEGMENT_TRS = 128


def correlations(series: np.ndarray) -> np.ndarray:
    """Functional connectivity: the correlation (V, V) of all pairs of parcels of a series (T, V), in float64.

    0 where a parcel is constant; NaN where it holds what is not a number.
    """
    mean = series.mean(axis=0, dtype=np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        centred = series - mean
        squares = np.square(centred).sum(axis=0)
        scaled = centred / np.sqrt(squares)
        flat = is_constant(squares[None], mean[None], np.array([len(series)]))[0]
        scaled[:, flat & np.isfinite(squares)] = 0.0
        return np.clip(scaled.T @ scaled, -1.0, 1.0)


class Connectivity:
    """The mean of many functional connectivities, the same to the bit in whatever order they come.

    Correlations lie between -1 and 1, so they are summed as integers, in units of 2^-40: ranks add up their own runs
    and need not keep a matrix for each of them.
    """

    def __init__(self, n_parcels: int) -> None:
        self.total = np.zeros((n_parcels, n_parcels), np.int64)
        self.weight = 0
        self.spoilt = np.zeros(n_parcels, bool)

    def add(self, connectivity: np.ndarray, weight: int) -> None:
        """Take in a matrix (V, V) that counts for `weight` TRs."""
        self.spoilt |= ~np.isfinite(np.diagonal(connectivity))
        known = np.where(np.isfinite(connectivity), connectivity, 0.0)
        self.total += np.rint(known * _FIXED_POINT).astype(np.int64) * weight
        self.weight += weight

    def merge(self, other: Connectivity) -> None:
        """Take in what another has seen."""
        self.total += other.total
        self.weight += int(other.weight)
        self.spoilt |= other.spoilt

    def mean(self) -> np.ndarray:
        """(V, V); NaN in the rows and columns of parcels that were not numbers somewhere, all of it without any TR."""
        found = self.total / (_FIXED_POINT * max(self.weight, 1))
        if not self.weight:
            found[:] = np.nan
        found[self.spoilt] = np.nan
        found[:, self.spoilt] = np.nan
        return found


def compare(connectivity: np.ndarray, real: np.ndarray) -> tuple[float, float]:
    """(correlation, mean absolute difference) of the parts of two connectivities (V, V) above the diagonal.

    The correlation is 0 where one of them is the same everywhere, NaN for fewer than two pairs of parcels.
    """
    above = np.triu_indices(len(real), 1)
    a, b = connectivity[above], real[above]
    if len(a) < 2:
        return float("nan"), float("nan")
    error = float(np.abs(a - b).mean())
    a, b = a - a.mean(), b - b.mean()
    size = float(np.sqrt((a @ a) * (b @ b)))
    return (float(a @ b) / size if size else 0.0), error


def segment_trs(lengths: Sequence[int]) -> int:
    """TRs of a segment of the spectrum, in a set of runs of these lengths: one grid of frequencies for all.

    No longer than the shortest run of two TRs or more: one TR has no spectrum, and no part in that of its set.
    """
    return min(SEGMENT_TRS, min((length for length in lengths if length > 1), default=1))


def frequencies(segment: int, tr_s: float) -> np.ndarray:
    """(F,) in Hz, without 0."""
    return np.fft.rfftfreq(segment, tr_s)[1:]


def spectrum(series: np.ndarray, segment: int, tr_s: float) -> np.ndarray:
    """Power spectral density (F,) of series (..., T, V), mean over all but time, in squared units of BOLD per Hz.

    Welch's method (1967, IEEE Trans. Audio Electroacoust. 15, 70): Hann windows that overlap by half, each without its
    mean. Empty for segments of one TR; 0 for a series that is shorter than a segment.
    """
    if segment < 2:
        return np.zeros(0)
    step = max(segment - segment // 2, 1)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(segment) / segment)
    starts = range(0, series.shape[-2] - segment + 1, step)
    if not starts:
        return np.zeros(segment // 2)
    power = np.zeros(segment // 2 + 1)
    for start in starts:
        piece = series[..., start : start + segment, :]
        piece = (piece - piece.mean(axis=-2, keepdims=True)) * window[:, None]
        squares = np.square(np.abs(np.fft.rfft(piece, axis=-2)))
        power += squares.reshape(-1, *squares.shape[-2:]).mean(axis=(0, 2))
        alive()
    density = power * tr_s / np.square(window).sum() / len(starts)
    density[1 : (segment + 1) // 2] *= 2  # the frequencies below 0, which all but 0 and the highest have
    return density[1:]


def spectrum_error(power: np.ndarray, real: np.ndarray) -> float:
    """Mean absolute log10 of the ratio of two spectra; NaN where one of them is empty."""
    with np.errstate(divide="ignore", invalid="ignore"):
        error = np.abs(np.log10(power / real)).mean() if len(real) else np.nan
    return float(error) if np.isfinite(error) else float("nan")
