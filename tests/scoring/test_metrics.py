"""Pearson r in one pass, against numpy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.scoring.metrics import Correlation, PearsonR

S, V = 3, 5


def brute_force(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.corrcoef(x.astype(np.float64), y.astype(np.float64))[0, 1])


def windows(rng: np.random.Generator, n_trs: int, offset: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    x = rng.normal(size=(1, S, n_trs, V))
    y = 0.3 * x + rng.normal(size=x.shape)
    return torch.tensor(x + offset), torch.tensor(y + offset)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=6), st.integers(0, 10_000))
def test_it_does_not_matter_how_the_trs_are_cut(lengths: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    parts = [windows(rng, n, offset=1e4) for n in lengths]
    one_pass = PearsonR(S, V)
    for x, y in parts:
        one_pass.update(x, y, torch.ones(x.shape[:3], dtype=torch.bool))
    merged = PearsonR(S, V)
    for x, y in parts:
        rank = PearsonR(S, V)
        rank.update(x, y, torch.ones(x.shape[:3], dtype=torch.bool))
        merged.merge(rank)
    if sum(lengths) < 3:
        return
    x, y = (torch.cat([p[i] for p in parts], dim=2)[0].numpy() for i in (0, 1))
    expected = np.array([[brute_force(x[s, :, v], y[s, :, v]) for v in range(V)] for s in range(S)])
    np.testing.assert_allclose(one_pass.compute().r, expected, atol=1e-6)
    np.testing.assert_allclose(merged.compute().r, expected, atol=1e-6)


def test_what_is_not_valid_is_never_read() -> None:
    x, y = windows(np.random.default_rng(0), 40)
    valid = torch.ones(1, S, 40, dtype=torch.bool)
    valid[0, 1] = False
    valid[0, 0, 30:] = False
    x[0, 1], y[0, 0, 30:] = float("nan"), float("inf")
    accumulator = PearsonR(S, V)
    accumulator.update(x, y, valid)
    found = accumulator.compute()
    assert found.n_trs.tolist() == [30, 0, 40]
    assert np.isnan(found.r[1]).all()
    assert found.r[0, 2] == pytest.approx(brute_force(x[0, 0, :30, 2].numpy(), y[0, 0, :30, 2].numpy()), abs=1e-9)


def test_a_missing_subject_is_left_out_of_the_mean_not_read_as_zero() -> None:
    r = np.array([[0.2, 0.4], [np.nan, np.nan], [0.6, 0.6]])
    assert Correlation(r, np.array([9, 0, 9]), 0).overall == pytest.approx(0.45)
    assert np.isnan(Correlation(r, np.zeros(3, int), 0).overall)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1e4])
def test_constant_parcels_have_r_0_and_are_counted(value: float) -> None:
    x, y = windows(np.random.default_rng(1), 50)
    y[0, 2, :, 3] = value
    x[0, 0, :, 1] = float(np.float32(value))
    accumulator = PearsonR(S, V)
    accumulator.update(x.float(), y.float(), torch.ones(1, S, 50, dtype=torch.bool))
    found = accumulator.compute()
    assert found.r[2, 3] == 0.0
    assert found.r[0, 1] == 0.0
    assert found.n_constant == 2
    assert np.isfinite(found.r).all()


def test_a_parcel_that_varies_little_around_a_large_mean_is_not_constant() -> None:
    x, y = windows(np.random.default_rng(2), 200)
    accumulator = PearsonR(S, V)
    accumulator.update((x * 0.1 + 1e4).float(), (y * 0.1 + 1e4).float(), torch.ones(1, S, 200, dtype=torch.bool))
    found = accumulator.compute()
    assert found.n_constant == 0
    assert found.r[0, 0] == pytest.approx(brute_force(x[0, 0, :, 0].numpy(), y[0, 0, :, 0].numpy()), abs=1e-3)
