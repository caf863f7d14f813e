"""Confidence intervals of r: the weighted sums are those of series that were drawn again, and they cover the truth."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ranks import on_ranks
from trainer.errors import InputError
from trainer.scoring import intervals
from trainer.scoring.intervals import RunSeries, block_weights, bootstrap, interval, overall_interval, run_weights
from trainer.scoring.metrics import PearsonR
from trainer.scoring.shares import OneProcess

ALONE = OneProcess(torch.device("cpu"))
S, V = 3, 4
TR_S = 6.0
"""Seconds of a TR; a block of 60 s has ten."""


def make_runs(
    lengths: list[int], seed: int = 0, offset: float = 1e4, absent: tuple[int, int] = (0, 2)
) -> list[RunSeries]:
    """Runs of float32 series far above zero; subject `absent[1]` lacks run `absent[0]`."""
    rng = np.random.default_rng(seed)
    runs = []
    for i, n_trs in enumerate(lengths):
        bold = rng.normal(size=(S, n_trs, V)) + rng.normal(size=(S, 1, V))
        prediction = 0.5 * bold + rng.normal(size=bold.shape)
        present = np.array([(i, s) != absent for s in range(S)])
        runs.append(RunSeries((prediction + offset).astype(np.float32), (bold + offset).astype(np.float32), present))
    return runs


def sums_of(runs: list[RunSeries]) -> list[PearsonR]:
    found = []
    for run in runs:
        found.append(PearsonR(S, V))
        valid = torch.from_numpy(run.present)[None, :, None].expand(1, S, run.bold.shape[1])
        found[-1].update(torch.from_numpy(run.prediction)[None], torch.from_numpy(run.bold)[None], valid)
    return found


def brute_force(runs: list[RunSeries], trs: list[np.ndarray]) -> np.ndarray:
    """(S,) mean r of series that are put together from the TRs that were drawn of each run, by numpy's corrcoef."""
    r = np.full(S, np.nan)
    for s in range(S):
        mine = [(run, drawn) for run, drawn in zip(runs, trs, strict=True) if run.present[s] and len(drawn)]
        if mine:
            x, y = (
                np.concatenate([getattr(run, name)[s, drawn].astype(np.float64) for run, drawn in mine])
                for name in ("prediction", "bold")
            )
            r[s] = np.mean([np.corrcoef(x[:, v], y[:, v])[0, 1] for v in range(V)])
    return r


def test_blocks_are_drawn_as_the_weights_say() -> None:
    runs = make_runs([23, 31])
    resampled = bootstrap("val", 6, TR_S, sums_of(runs), runs, ALONE)
    weights = block_weights("val", 6, [23, 31], 10)
    assert resampled.shape == (6, S)
    for b in range(6):
        wanted = brute_force(runs, [np.repeat(np.arange(w.shape[1]), w[b]) for w in weights])
        np.testing.assert_allclose(resampled[b], wanted, rtol=0, atol=1e-9)
    assert len(np.unique(resampled[:, 0].round(6))) == 6


def test_runs_are_drawn_as_the_weights_say_also_where_a_resampling_lacks_a_subject() -> None:
    runs = make_runs([9, 5, 7, 6, 8, 9, 5, 4, 7, 6])
    for run in runs[:-1]:
        run.present[1] = False
    resampled = bootstrap("val", 20, TR_S, sums_of(runs), None, ALONE)
    weights = run_weights("val", 20, 10).astype(int)
    for b in range(20):
        drawn = [np.tile(np.arange(run.bold.shape[1]), n) for run, n in zip(runs, weights[b], strict=True)]
        np.testing.assert_allclose(resampled[b], brute_force(runs, drawn), rtol=0, atol=1e-9)
    assert 0 < np.isnan(resampled[:, 1]).sum() < 20
    assert overall_interval(resampled, np.ones(S, bool)) == interval(np.nanmean(resampled, axis=1))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=4), st.integers(1, 25), st.integers(1, 9))
def test_a_resampling_keeps_the_lengths_and_is_made_of_blocks_and_more_of_them_change_none(
    lengths: list[int], block: int, n_resamplings: int
) -> None:
    weights = block_weights("val", n_resamplings, lengths, block)
    more = block_weights("val", n_resamplings + 3, lengths, block)
    for n_trs, drawn, longer in zip(lengths, weights, more, strict=True):
        assert drawn.shape == (n_resamplings, n_trs)
        assert (drawn >= 0).all()
        assert (drawn.sum(axis=1) == n_trs).all()
        assert np.array_equal(longer[:n_resamplings], drawn)
        if n_trs <= block:
            assert (drawn == 1).all()
        edges = np.abs(np.diff(drawn.astype(int), prepend=0, append=0)).sum(axis=1)
        assert (edges <= 2 * -(-n_trs // block)).all(), "no more pieces than blocks"


def test_blocks_lie_anywhere_and_other_sets_draw_others() -> None:
    (weights,) = block_weights("val", 400, [40], 10)
    assert (weights.sum(axis=0) > 0).all()
    assert {np.flatnonzero(np.diff(row, prepend=0) > 0)[0] % 10 for row in weights} == set(range(10))
    (cut,) = block_weights("val", 400, [15], 10)
    beyond = (cut[:, 0] > 0) & (cut[:, 8] == 2) & (cut[:, 12] > 0)
    assert beyond.any(), "the last block, cut to five TRs, may begin where a whole one would not fit"
    assert not np.array_equal(weights, block_weights("test", 400, [40], 10)[0])
    assert not np.array_equal(run_weights("val", 5, 12), run_weights("test", 5, 12))


def test_a_short_set_cannot_be_drawn_again() -> None:
    assert not intervals.can_draw([10, 9], TR_S)
    assert intervals.can_draw([10, 11], TR_S)
    assert intervals.can_draw([4] * 10, TR_S)


@pytest.mark.filterwarnings("error")
def test_a_parcel_of_zeros_counts_as_0_and_what_is_not_a_number_shows() -> None:
    runs = make_runs([23, 31])
    for run in runs:
        run.bold[0, :, 1] = 0.0
        run.prediction[1, :, 2] = 1e4
    runs[1].prediction[2, 3, 0] = np.nan
    resampled = bootstrap("val", 8, TR_S, sums_of(runs), runs, ALONE)
    assert np.isfinite(resampled[:, :2]).all()
    assert np.isnan(resampled[:, 2]).all()
    assert overall_interval(resampled, np.ones(S, bool)) is None
    assert overall_interval(resampled, np.array([True, True, False])) is not None
    for run in runs:
        run.bold[0, :, 1] = run.prediction[0, :, 1]
    others = bootstrap("val", 8, TR_S, sums_of(runs), runs, ALONE)
    np.testing.assert_allclose(others[:, 0] - resampled[:, 0], 1 / V, atol=1e-9)


@pytest.mark.parametrize("lengths", [[23, 31], [9] * 10], ids=["blocks", "runs"])
def test_any_number_of_ranks_gives_the_same_bits(lengths: list[int]) -> None:
    runs = make_runs(lengths)
    series = runs if len(runs) < 10 else None
    wanted = bootstrap("val", 7, TR_S, sums_of(runs), series, ALONE)
    for world in (2, 3):
        for found in on_ranks(world, lambda rank: bootstrap("val", 7, TR_S, sums_of(runs), series, rank)):
            np.testing.assert_array_equal(found, wanted)


def test_parcels_that_are_taken_in_turns_are_all_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = make_runs([23, 31])
    wanted = bootstrap("val", 4, TR_S, sums_of(runs), runs, ALONE)
    monkeypatch.setattr(intervals, "_PARCELS_AT_ONCE", 3)
    np.testing.assert_allclose(bootstrap("val", 4, TR_S, sums_of(runs), runs, ALONE), wanted, rtol=1e-12)


def autocorrelated(rng: np.random.Generator, shape: tuple[int, ...], phi: float = 0.8) -> np.ndarray:
    """Stationary AR(1) series of variance 1 along the first axis."""
    noise = rng.normal(size=shape)
    series = np.empty(shape)
    series[0] = noise[0]
    for t in range(1, len(series)):
        series[t] = phi * series[t - 1] + np.sqrt(1 - phi**2) * noise[t]
    return series


def coverage(block: int) -> float:
    """How often the interval of r = 0.5 holds it, over data sets of one run of 400 autocorrelated TRs."""
    rng = np.random.default_rng(5)
    (weights,) = block_weights("val", 200, [400], block)
    held = []
    for _ in range(150):
        shared = autocorrelated(rng, (400, 1))
        x, y = (np.sqrt(0.5) * (shared + autocorrelated(rng, (400, 1))) for _ in range(2))
        sums = intervals.ResampledSums(200, x.mean(axis=0), y.mean(axis=0))
        sums.add_trs(weights, x, y)
        limits = interval(sums.r()[:, 0])
        assert limits is not None
        held.append(limits[0] < 0.5 < limits[1])
    return float(np.mean(held))


def test_intervals_cover_the_truth_where_neighbours_are_alike_and_would_not_without_blocks() -> None:
    assert 0.88 <= coverage(block=40) <= 0.99
    assert coverage(block=1) < 0.75


def test_the_interval_is_that_of_the_quantiles_of_what_is_known() -> None:
    values = np.arange(1001.0)
    assert interval(values) == pytest.approx((25.0, 975.0))
    assert interval(np.append(values, np.nan)) == interval(values)
    assert interval(np.array([np.nan])) is None


def test_a_difference_is_paired() -> None:
    rng = np.random.default_rng(0)
    common = rng.normal(size=(500, 2))
    a, b = common + 0.02, common + 0.001 * rng.normal(size=(500, 2))
    difference, low, high = intervals.paired_difference(a, b)
    assert difference == pytest.approx(0.02, abs=1e-3)
    assert 0.015 < low < difference < high < 0.025
    lacking = np.full((500, 1), np.nan)
    with_absent = intervals.paired_difference(np.hstack([a, lacking]), np.hstack([b, lacking]))
    assert with_absent == (difference, low, high)
    spoilt = intervals.paired_difference(np.hstack([a, lacking]), np.hstack([b, common[:, :1]]))
    assert np.isnan(spoilt).all(), "a subject that one score alone lacks is no difference of 0"
    with pytest.raises(InputError, match=r"500, 2.*evaluate\.bootstrap"):
        intervals.paired_difference(a, b[:100])
