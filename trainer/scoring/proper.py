"""How good samples are as a distribution: CRPS, energy and variogram score, and what intervals cover.

All in float64, from K >= 2 samples (K, T, V) of one subject and run and the BOLD (T, V). The scores are the fair ones
(Ferro 2014, Q. J. R. Meteorol. Soc. 140, 1917): their expectation is that of the distribution the samples come from,
whatever K is, since pairs of samples are counted K (K - 1) times. Lower is better. What is not a number stays so.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from trainer.progress import alive

LEVELS = (0.5, 0.8, 0.95)
VARIOGRAM_PARCELS = 100
VARIOGRAM_TRS = 100
"""The variogram score looks at all pairs of parcels in all TRs: of so many at most, spread evenly."""

_NUMBERS_AT_ONCE = 2**23
"""Copies of the samples are made of some TRs at a time, 64 MiB each, wherever that leaves every bit as it is."""


def crps(samples: np.ndarray, bold: np.ndarray) -> np.ndarray:
    """Continuous ranked probability score of each TR and parcel (T, V), in the units of BOLD.

    E|x - y| - E|x - x'| / 2 (Gneiting and Raftery 2007, J. Am. Stat. Assoc. 102, 359). The sum over pairs follows from
    the sorted samples: the k-th of K is larger than k - 1 of them and smaller than K - k.
    """
    count = len(samples)
    rank_weights = 2.0 * np.arange(1, count + 1) - count - 1
    ordered = np.subtract(samples, bold, out=np.empty(samples.shape))  # in an order that the product needs no copy of
    for trs in _parts(samples):
        ordered[:, trs].sort(axis=0)
    # in one product: its last bits depend on the shape
    spread: np.ndarray = np.tensordot(rank_weights, ordered, axes=1) / (count * (count - 1))
    for trs in _parts(samples):
        spread[trs] = np.abs(ordered[:, trs]).mean(axis=0) - spread[trs]
    return spread


def _parts(samples: np.ndarray) -> Iterator[slice]:
    """The TRs of samples (K, T, V) in parts that bound the copies, each of which is told to go on."""
    count, n_trs, parcels = samples.shape
    step = max(1, _NUMBERS_AT_ONCE // (count * parcels))
    for start in range(0, n_trs, step):
        yield slice(start, start + step)
        alive()


def energy_score(samples: np.ndarray, bold: np.ndarray) -> np.ndarray:
    """Energy score over all parcels of each TR (T,): the CRPS with the Euclidean norm over parcels."""
    count = len(samples)
    found = np.empty(len(bold))
    for trs in _parts(samples):
        # (T, K, V): around the BOLD the Gram matrix loses no digits
        away = (samples[:, trs] - bold[trs]).transpose(1, 0, 2)
        gram = away @ away.transpose(0, 2, 1)
        squares = np.diagonal(gram, axis1=1, axis2=2)
        apart = np.sqrt(np.maximum(squares[:, :, None] + squares[:, None] - 2 * gram, 0.0))
        apart[:, np.arange(count), np.arange(count)] = 0.0
        found[trs] = np.sqrt(squares).mean(axis=1) - apart.sum(axis=(1, 2)) / (2 * count * (count - 1))
    return found


def variogram_score(samples: np.ndarray, bold: np.ndarray) -> np.ndarray:
    """Variogram score of order 0.5 of each TR (T,), mean over the pairs of parcels i < j; (T,) NaN for one parcel.

    (|y_i - y_j|^p - E|x_i - x_j|^p)^2 (Scheuerer and Hamill 2015, Mon. Weather Rev. 143, 1321). The square of the
    difference to a mean of K samples is too large by the variance of that mean, which is taken away.
    """
    count, n_trs, parcels = samples.shape
    total = np.zeros(n_trs)
    for i in range(parcels - 1):
        seen = np.sqrt(np.abs(bold[:, i, None] - bold[:, i + 1 :]))
        apart = np.abs(samples[:, :, i, None] - samples[:, :, i + 1 :])
        drawn = np.sqrt(apart).mean(axis=0)
        variance = apart.mean(axis=0) - drawn**2  # the square of what order 0.5 takes the root of is there already
        total += ((seen - drawn) ** 2 - variance / (count - 1)).sum(axis=1)
        alive()
    pairs = parcels * (parcels - 1) // 2
    return total / pairs if pairs else np.full(n_trs, np.nan)


def spread_evenly(size: int, most: int) -> np.ndarray:
    """At most so many of the indices below `size`, evenly spaced, the same whenever asked."""
    return np.arange(size) if size <= most else np.linspace(0, size - 1, most).round().astype(int)


def coverage(samples: np.ndarray, bold: np.ndarray) -> np.ndarray:
    """(levels, T, V): the share of each value of BOLD that the central 50, 80 and 95 % intervals hold.

    K samples cut the line into K + 1 parts that are equally likely where the samples are right, so a value in the part
    of rank k stands for the probabilities k / (K + 1) to (k + 1) / (K + 1), and counts with what of them lies within
    an interval. The mean over TRs is then the level itself for samples that are right, at any K; the quantiles of few
    samples would cover less. What lies beyond all samples is taken to lie there as it should: at K = 16 an interval of
    95 % is not missed by more than 43 % of such values. A value that equals some samples stands for all ranks between.
    """
    count = len(samples)
    found = np.empty((len(LEVELS), *bold.shape))
    for trs in _parts(samples):
        low = (samples[:, trs] < bold[trs]).sum(axis=0) / (count + 1)
        high = ((samples[:, trs] <= bold[trs]).sum(axis=0) + 1) / (count + 1)
        unknown = ~np.isfinite(samples[:, trs]).all(axis=0)
        for share, level in zip(found, LEVELS, strict=True):
            inside = np.minimum(high, (1 + level) / 2) - np.maximum(low, (1 - level) / 2)
            share[trs] = np.where(unknown, np.nan, np.maximum(inside, 0.0) / (high - low))
    return found
