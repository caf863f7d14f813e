"""Connectivity and spectrum, against numpy and scipy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import signal

from trainer.scoring import connectivity
from trainer.scoring.connectivity import Connectivity


def series(n_trs: int = 50, parcels: int = 4, offset: float = 1e4) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.normal(size=(n_trs, parcels)) @ rng.normal(size=(parcels, parcels)) + offset


@pytest.mark.filterwarnings("error")
def test_correlations_are_numpys_with_0_where_a_parcel_is_constant() -> None:
    x = series()
    np.testing.assert_allclose(connectivity.correlations(x), np.corrcoef(x.T), atol=1e-9)
    x[:, 2] = 0.1
    found = connectivity.correlations(x.astype(np.float32))
    assert not found[2].any()
    assert not found[:, 2].any()
    kept = np.ix_([0, 1, 3], [0, 1, 3])
    np.testing.assert_allclose(found[kept], np.corrcoef(x.T[[0, 1, 3]]), atol=1e-3)
    x[3, 1] = np.nan
    spoilt = connectivity.correlations(x)
    assert np.isnan(spoilt[1]).all()
    assert np.isfinite(spoilt[kept[0][[0, 2]], kept[1][:, [0, 2]]]).all()


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(6)), st.integers(1, 5))
def test_means_are_the_same_to_the_bit_in_any_order_and_from_any_parts(order: list[int], cut: int) -> None:
    rng = np.random.default_rng(3)
    matrices, weights = rng.uniform(-1, 1, (6, 3, 3)), rng.integers(1, 900, 6)

    def of(numbers: list[int]) -> Connectivity:
        found = Connectivity(3)
        for i in numbers:
            found.add(matrices[i], int(weights[i]))
        return found

    wanted = of(list(range(6))).mean()
    first, second = of(order[:cut]), of(order[cut:])
    first.merge(second)
    np.testing.assert_array_equal(first.mean(), wanted)
    np.testing.assert_allclose(wanted, np.average(matrices, axis=0, weights=weights), atol=1e-11)


def test_a_parcel_that_is_not_a_number_somewhere_has_no_mean() -> None:
    found = Connectivity(3)
    found.add(np.eye(3), 5)
    spoilt = np.eye(3)
    spoilt[1] = spoilt[:, 1] = np.nan
    other = Connectivity(3)
    other.add(spoilt, 5)
    found.merge(other)
    assert np.isnan(found.mean()).sum() == 5
    assert found.mean()[0, 0] == 1.0


def test_as_many_trs_as_there_ever_are_fit_into_the_integers() -> None:
    found = Connectivity(1)
    for _ in range(4):
        found.add(np.ones((1, 1)), 1_000_000)
    assert found.mean()[0, 0] == 1.0


def test_connectivities_are_compared_above_the_diagonal() -> None:
    rng = np.random.default_rng(1)
    a, b = (np.corrcoef(rng.normal(size=(5, 9))) for _ in range(2))
    above = np.triu_indices(5, 1)
    r, error = connectivity.compare(a, b)
    assert r == pytest.approx(np.corrcoef(a[above], b[above])[0, 1])
    assert error == pytest.approx(np.mean([abs(a[i, j] - b[i, j]) for i in range(5) for j in range(i)]))
    assert connectivity.compare(np.eye(5), b)[0] == 0.0
    assert np.isnan(connectivity.compare(np.eye(2), np.eye(2))).all()
    b[2] = b[:, 2] = np.nan
    assert np.isnan(connectivity.compare(a, b)).all()


@pytest.mark.parametrize("segment", [2, 7, 16, 33, 50])
def test_the_spectrum_is_welchs(segment: int) -> None:
    x = np.stack([series(), series()[::-1]])
    frequency, power = signal.welch(x, 1 / 1.49, "hann", segment, segment // 2, axis=1)
    np.testing.assert_allclose(connectivity.frequencies(segment, 1.49), frequency[1:])
    np.testing.assert_allclose(connectivity.spectrum(x, segment, 1.49), power.mean(axis=(0, 2))[1:], rtol=1e-9)


def test_spectra_are_compared_by_the_logarithm() -> None:
    real = np.array([1.0, 2.0, 4.0])
    assert connectivity.spectrum_error(real * [10, 1, 0.1], real) == pytest.approx(2 / 3)
    assert np.isnan(connectivity.spectrum_error(np.zeros(3), real))
    assert np.isnan(connectivity.spectrum_error(np.zeros(0), np.zeros(0)))
    assert len(connectivity.spectrum(series(5), connectivity.segment_trs([1, 1]), 1.49)) == 0


def test_a_run_of_one_tr_does_not_shorten_the_segments_of_the_others() -> None:
    assert [connectivity.segment_trs(lengths) for lengths in ([600, 300], [40, 1, 90], [2, 1])] == [128, 40, 2]
    assert not connectivity.spectrum(series(1), 40, 1.49).any()


def test_nothing_is_known_of_what_was_never_seen() -> None:
    assert np.isnan(connectivity.Connectivity(3).mean()).all()
