"""The scores of samples as a distribution, against loops over the formulas, and against what right samples must get."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.scoring import proper

K, T, V = 5, 4, 3


def make(seed: int, offset: float = 0.0, shape: tuple[int, int, int] = (K, T, V)) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=shape) + offset, 1.3 * rng.normal(size=shape[1:]) + offset


def fair(distance: object, samples: np.ndarray, bold: np.ndarray) -> float:
    """mean d(x, y) - sum over pairs of d(x, x') / (2 K (K - 1))."""
    assert callable(distance)
    pairs = sum(distance(a, b) for a, b in itertools.permutations(samples, 2))
    count = len(samples)
    return float(np.mean([distance(x, bold) for x in samples]) - pairs / (2 * count * (count - 1)))


def variogram_by_hand(samples: np.ndarray, bold: np.ndarray) -> float:
    """Mean over pairs of parcels of the unbiased estimate of (v_y - E v)^2: the product over pairs of samples."""
    found = []
    for i, j in itertools.combinations(range(len(bold)), 2):
        seen = abs(bold[i] - bold[j]) ** 0.5
        drawn = [abs(x[i] - x[j]) ** 0.5 for x in samples]
        found.append(np.mean([(seen - a) * (seen - b) for a, b in itertools.permutations(drawn, 2)]))
    return float(np.mean(found))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 9), st.sampled_from([0.0, 1e4]))
def test_scores_are_the_formulas(seed: int, count: int, offset: float) -> None:
    samples, bold = make(seed, offset, (count, T, V))
    crps, energy, variogram = (f(samples, bold) for f in (proper.crps, proper.energy_score, proper.variogram_score))
    for t in range(T):
        for v in range(V):
            wanted = fair(lambda a, b: abs(a - b), samples[:, t, v], bold[t, v])
            assert crps[t, v] == pytest.approx(wanted, abs=1e-9)
        assert energy[t] == pytest.approx(fair(lambda a, b: np.linalg.norm(a - b), samples[:, t], bold[t]), abs=1e-6)
        assert variogram[t] == pytest.approx(variogram_by_hand(samples[:, t], bold[t]), abs=1e-6)


@pytest.mark.parametrize("score", [proper.crps, proper.energy_score, proper.variogram_score])
def test_scores_of_few_samples_are_those_of_many_on_average_and_lowest_for_what_is_right(score: object) -> None:
    assert callable(score)
    rng = np.random.default_rng(1)
    factor = np.linalg.cholesky(np.array([[1, 0.8, 0.3], [0.8, 1, 0.3], [0.3, 0.3, 1]]))
    bold = rng.normal(size=(6000, 3)) @ factor.T

    def mean_score(count: int, scale: float) -> tuple[float, float]:
        values = score(scale * rng.normal(size=(count, len(bold), 3)) @ factor.T, bold)
        return values.mean(), values.std() / np.sqrt(len(bold))

    (two, error), (many, _) = mean_score(2, 1.0), mean_score(16, 1.0)
    assert abs(two - many) < 5 * error
    wide, narrow = mean_score(16, 1.6)[0], mean_score(16, 0.5)[0]
    assert many < min(wide, narrow)


def test_the_variogram_score_sees_a_correlation_that_is_missing() -> None:
    rng = np.random.default_rng(2)
    factor = np.linalg.cholesky(np.array([[1, 0.8], [0.8, 1]]))
    bold = rng.normal(size=(4000, 2)) @ factor.T
    noise = rng.normal(size=(16, 4000, 2))
    right, without = (proper.variogram_score(samples, bold).mean() for samples in (noise @ factor.T, noise))
    assert right < 0.9 * without


@pytest.mark.parametrize("count", [2, 3, 16, 99])
def test_right_samples_cover_as_much_as_they_should_at_any_number(count: int) -> None:
    rng = np.random.default_rng(count)
    bold = rng.normal(size=(200, 100))
    covered = proper.coverage(rng.normal(size=(count, 200, 100)), bold).mean(axis=(1, 2))
    np.testing.assert_allclose(covered, proper.LEVELS, atol=0.012)


def test_narrow_samples_cover_too_little_and_wide_ones_too_much() -> None:
    rng = np.random.default_rng(0)
    bold = rng.normal(size=(200, 100))
    noise = rng.normal(size=(99, 200, 100))
    narrow, wide = (proper.coverage(scale * noise, bold).mean(axis=(1, 2)) for scale in (0.5, 2.0))
    # P(|x| < z_q / 2) and P(|x| < 2 z_q) of the normal distribution, for its quantiles z_q
    np.testing.assert_allclose(narrow[:2], [0.264, 0.478], atol=0.015)
    np.testing.assert_allclose(wide[:2], [0.823, 0.990], atol=0.015)
    assert narrow[2] < 0.9
    assert wide[2] > 0.99


def test_coverage_is_what_random_ranks_give() -> None:
    """A value of rank k stands for a number drawn between k / (K + 1) and (k + 1) / (K + 1); ties for all between."""
    rng = np.random.default_rng(4)
    samples, bold = make(4)
    samples[1:4, 0, 0] = bold[0, 0]
    samples[:, 1, 1] = bold[1, 1]
    found = proper.coverage(samples, bold)
    for t, v in itertools.product(range(T), range(V)):
        below, equal = (samples[:, t, v] < bold[t, v]).sum(), (samples[:, t, v] == bold[t, v]).sum()
        numbers = (below + (1 + equal) * rng.random(40_000)) / (K + 1)
        for level, share in zip(proper.LEVELS, found[:, t, v], strict=True):
            assert share == pytest.approx((np.abs(numbers - 0.5) < level / 2).mean(), abs=0.015)


def test_samples_that_are_all_the_same_are_scored_as_a_point() -> None:
    _, bold = make(0)
    samples = np.zeros((K, T, V))
    np.testing.assert_allclose(proper.crps(samples, bold), np.abs(bold))
    np.testing.assert_allclose(proper.energy_score(samples, bold), np.linalg.norm(bold, axis=1), atol=1e-7)
    assert np.isnan(proper.variogram_score(samples[..., :1], bold[..., :1])).all()


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_a_number_shows(value: float) -> None:
    samples, bold = make(0)
    samples[2, 1, 1] = value
    assert np.argwhere(~np.isfinite(proper.crps(samples, bold))).tolist() == [[1, 1]]
    assert np.flatnonzero(~np.isfinite(proper.energy_score(samples, bold))).tolist() == [1]
    assert np.flatnonzero(~np.isfinite(proper.variogram_score(samples, bold))).tolist() == [1]
    assert np.argwhere(~np.isfinite(proper.coverage(samples, bold)[0])).tolist() == [[1, 1]]


@given(st.integers(1, 500), st.integers(2, 120))
def test_indices_are_spread_from_end_to_end(size: int, most: int) -> None:
    found = proper.spread_evenly(size, most)
    assert len(found) == min(size, most)
    assert len(set(found)) == len(found)
    assert (found[0], found[-1]) == (0, size - 1)


@pytest.mark.parametrize("shape", [(16, 60, 33), (3, 7, 2), (8, 1, 50)])
@pytest.mark.parametrize("by_trs", [False, True], ids=["samples first", "TRs first in memory"])
def test_parts_that_bound_the_memory_change_no_bit(
    shape: tuple[int, int, int], by_trs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    samples, bold = rng.normal(size=shape), rng.normal(size=shape[1:])
    if by_trs:
        samples = np.ascontiguousarray(samples.transpose(1, 0, 2)).transpose(1, 0, 2)
    measures = (proper.crps, proper.energy_score, proper.coverage)
    wanted = [measure(samples, bold) for measure in measures]
    monkeypatch.setattr(proper, "_NUMBERS_AT_ONCE", 3 * shape[0] * shape[2])
    for measure, values in zip(measures, wanted, strict=True):
        np.testing.assert_array_equal(measure(samples, bold), values)
