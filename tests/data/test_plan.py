"""Windows follow from (seed, epoch, k) alone, lie inside their spans, and cover them in proportion."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.config import Filter
from trainer.data.manifest import FileRecord, Manifest, Sample
from trainer.data.plan import Part, Plan, Span, micro_batches, permute, select
from trainer.errors import InputError


def _sample(run: str, n_trs: int, **more: object) -> Sample:
    values = {"series": "friends", "repeat": 1, "season": None, "episode": None, "film": None, "part": None}
    values |= {"subjects": ("1", "2", "3"), **more}
    return Sample(key=run, shard=0, run=run, n_trs=n_trs, arrays={}, **values)  # type: ignore[arg-type]


SAMPLES = (
    _sample("s01e01a", 100, season=1),
    _sample("s01e01b", 50, season=1, subjects=("1", "3")),
    _sample("s02e01a", 80, season=2),
    _sample("bourne01", 60, series="movie10", film="bourne"),
    _sample("life01", 40, series="movie10", film="life"),
    _sample("life01", 40, series="movie10", film="life", repeat=2, subjects=("2",)),
)
NOTHING = FileRecord("statistics.safetensors", 0, "")
MANIFEST = Manifest("m", 1.5, ("1", "2", "3"), 10, (), SAMPLES, (), NOTHING, Path("there"))


def _chosen(**keys: object) -> list[tuple[int, int, int]]:
    return [(s.sample, s.start, s.stop) for s in select(MANIFEST, Filter(**keys))]  # type: ignore[arg-type]


def test_a_run_whose_name_is_like_a_pattern_is_chosen_by_its_name() -> None:
    manifest = replace(
        MANIFEST, samples=(_sample("film[1]", 9), _sample("film1", 9), _sample("a*", 9), _sample("ab", 9))
    )
    for name in ("film[1]", "a*"):
        assert manifest.samples[select(manifest, Filter(runs=[name]))[0].sample].run == name
    assert [s.sample for s in select(manifest, Filter(runs=["film[[]1]"]))] == [0]
    assert [s.sample for s in select(manifest, Filter(runs=["film*"]))] == [0, 1]


def test_empty_filter_takes_every_whole_run() -> None:
    assert _chosen() == [(i, 0, s.n_trs) for i, s in enumerate(SAMPLES)]


@pytest.mark.parametrize(
    ("keys", "samples"),
    [
        ({"seasons": [1]}, [0, 1]),
        ({"films": ["life"]}, [4, 5]),
        ({"seasons": [2], "films": ["bourne"]}, [2, 3]),
        ({"seasons": [], "films": ["bourne"]}, [3]),
        ({"seasons": [1, 2], "series": ["friends"], "runs": ["*a"]}, [0, 2]),
        ({"runs": ["life01", "s02*"]}, [2, 4, 5]),
        ({"repeats": [1], "series": ["movie10"]}, [3, 4]),
        ({"subjects": ["1"]}, [0, 1, 2, 3, 4]),
    ],
)
def test_filter_keys_intersect_but_seasons_and_films_unite(keys: dict, samples: list[int]) -> None:
    assert [s for s, _, _ in _chosen(**keys)] == samples


def test_subjects_are_those_present_and_wanted() -> None:
    spans = select(MANIFEST, Filter(subjects=["2", "3"]))
    assert [s.subjects for s in spans] == [
        (False, True, True), (False, False, True), *[(False, True, True)] * 3, (False, True, False),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("trs", "expected"),
    [
        ([0, -30], (0, 70)),
        ([-30, None], (70, 100)),
        ([None, 20], (0, 20)),
        ([10, 20], (10, 20)),
        ([-1000, 5], (0, 5)),
        ([90, 1000], (90, 100)),
    ],
)
def test_tr_range_is_a_slice_of_the_run(trs: list[int | None], expected: tuple[int, int]) -> None:
    assert _chosen(runs=["s01e01a"], trs=trs) == [(0, *expected)]


def test_run_in_which_the_tr_range_leaves_nothing_is_dropped() -> None:
    assert _chosen(trs=[55, None]) == [(0, 55, 100), (2, 55, 80), (3, 55, 60)]


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"films": ["bourn"]}, ["filter.films", "found bourn", "Did you mean bourne?"]),
        ({"seasons": [7]}, ["filter.seasons", "found 7", "among 1, 2"]),
        ({"subjects": ["5"]}, ["filter.subjects", "among 1, 2, 3"]),
        ({"series": ["freinds"]}, ["Did you mean friends?"]),
        ({"repeats": [3]}, ["filter.repeats", "among 1, 2"]),
        ({"runs": ["s01e01c"]}, ["filter.runs", "s01e01c", "a run such as s01e01"]),
        ({"trs": [500, None]}, ["no run left", "'trs': [500, None]", "runs of 40 to 100 TRs"]),
        ({"seasons": [1], "repeats": [2]}, ["no run left", "'seasons': [1]", "films bourne, life"]),
        ({"seasons": [], "films": []}, ["no run left", "seasons 1, 2"]),
    ],
)
def test_filter_that_fits_nothing_says_what_exists(keys: dict, words: list[str]) -> None:
    with pytest.raises(InputError) as error:
        _chosen(**keys)
    for word in words:
        assert word in str(error.value)


spans_strategy = st.lists(
    st.tuples(st.integers(0, 50), st.integers(1, 300), st.lists(st.booleans(), min_size=2, max_size=2).map(tuple)),
    min_size=1,
    max_size=12,
).map(
    lambda drawn: [Span(i, start, start + length, (True, *others)) for i, (start, length, others) in enumerate(drawn)]
)


@settings(max_examples=60, deadline=None)
@given(
    spans=spans_strategy,
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 1000),
    length=st.integers(1, 90),
    steps=st.integers(1, 9),
)
def test_every_window_lies_inside_its_span_and_is_as_long_as_it_can_be(
    spans: list[Span], seed: int, epoch: int, length: int, steps: int
) -> None:
    plan = Plan(spans, seed, length, 8 * steps + 5, 8)
    assert plan.steps_per_epoch == (8 * steps + 5) // 8
    seen = []
    for k in range(plan.steps_per_epoch):
        for window in plan.batch(epoch, k):
            span = spans[window.sample]
            assert span.start <= window.start < window.stop <= span.stop
            assert len(window) == min(length, len(span))
            seen.append(window.index)
    assert seen == list(range(plan.steps_per_epoch * 8))


@settings(max_examples=100, deadline=None)
@given(
    spans=spans_strategy,
    seed=st.integers(0, 2**40),
    step=st.integers(0, 200),
    world=st.sampled_from([1, 2, 3, 4, 8]),
    accumulation=st.integers(1, 3),
    size=st.integers(1, 3),
)
def test_any_world_and_accumulation_read_the_same_batch_and_seeking_is_replaying(
    spans: list[Span], seed: int, step: int, world: int, accumulation: int, size: int
) -> None:
    batch_size = world * accumulation * size
    plan = Plan(spans, seed, 20, 5 * batch_size + 1, batch_size)
    batch = plan.batch(*divmod(step, plan.steps_per_epoch))
    parts = [
        Plan(spans, seed, 20, 5 * batch_size + 1, batch_size).micro_batch(step, Part(rank, world, accumulation, turn))
        for rank in range(world)
        for turn in range(accumulation)
    ]
    assert {len(part) for part in parts} == {size}
    assert [window for part in parts for window in part] == batch
    assert [m for rank in range(world) for m in micro_batches(batch, rank, world, accumulation)] == parts
    assert plan.terms(step) == sum(len(window) * sum(window.subjects) for part in parts for window in part)


@settings(max_examples=40, deadline=None)
@given(spans=spans_strategy, seed=st.integers(0, 1000), epoch=st.integers(0, 50))
def test_an_epoch_meets_spans_in_proportion_to_their_length(spans: list[Span], seed: int, epoch: int) -> None:
    plan = Plan(spans, seed, 10, 512, 8)
    span, _, _ = plan.windows(epoch, np.arange(512))
    lengths = np.array([len(s) for s in spans])
    expected = 512 * lengths / lengths.sum()
    assert (np.abs(np.bincount(span, minlength=len(spans)) - expected) <= 2).all()


def test_starts_are_uniform_over_the_valid_offsets() -> None:
    plan = Plan([Span(0, 7, 47, (True,))], 1, 31, 4000, 8)
    starts = np.concatenate([plan.windows(epoch, np.arange(4000))[1] for epoch in range(3)])
    assert (starts.min(), starts.max()) == (7, 16)
    np.testing.assert_allclose(np.bincount(starts - 7) / len(starts), 0.1, atol=0.005)


def test_seed_and_epoch_change_the_windows_and_their_order() -> None:
    spans = [Span(i, 0, 200, (True,)) for i in range(5)]
    starts = {
        (seed, epoch): tuple(np.stack(Plan(spans, seed, 16, 64, 8).windows(epoch, np.arange(64)))[:2].ravel())
        for seed in (0, 1, 2)
        for epoch in (0, 1, 2)
    }
    assert len(set(starts.values())) == 9
    order = Plan(spans, 0, 16, 4096, 8).windows(0, np.arange(4096))[0]
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.06
    assert abs(np.corrcoef(order, np.arange(4096))[0, 1]) < 0.06


def test_windows_stay_what_they_are_across_versions() -> None:
    plan = Plan([Span(0, 0, 100, (True,)), Span(1, 0, 300, (True,))], 3315, 64, 16, 8)
    pinned = [(1, 145), (1, 118), (0, 22), (0, 8), (1, 161), (1, 63), (1, 17), (1, 46)]
    assert [(w.sample, w.start) for w in plan.batch(2, 1)] == pinned


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_permutation_meets_everything_once(n: int, key: int) -> None:
    permuted = permute(np.arange(n), n, np.array([key], np.uint64))
    assert sorted(permuted.tolist()) == list(range(n))


def test_seeking_in_a_huge_epoch_costs_as_little_as_in_a_small_one() -> None:
    spans = [Span(i, 0, 500, (True,)) for i in range(300)]
    plan = Plan(spans, 0, 64, 10**7, 1000)
    start = time.perf_counter()
    plan.batch(3, 9_000)
    assert time.perf_counter() - start < 0.1


def test_batch_that_does_not_divide_lists_the_worlds_that_fit() -> None:
    with pytest.raises(InputError, match=r"12 windows cannot be shared by 5 processes.*1, 2, 3, 4, 6, 12 processes"):
        micro_batches(range(12), 0, 5)


def test_batch_outside_the_epoch_is_refused() -> None:
    with pytest.raises(IndexError):
        Plan([Span(0, 0, 9, (True,))], 0, 4, 16, 8).batch(0, 2)


def test_fewer_windows_than_a_batch_is_refused() -> None:
    with pytest.raises(InputError, match="num_samples"):
        Plan([Span(0, 0, 9, (True,))], 0, 4, 7, 8)


def test_accumulation_counts_when_the_worlds_that_fit_are_listed() -> None:
    with pytest.raises(InputError, match=r"3 processes in 2 micro-batches each.*Use one of 1, 2, 4, 8 processes.*of 6"):
        micro_batches(range(16), 0, 3, 2)
    with pytest.raises(InputError, match=r"Use a batch_size that is a multiple of 7\."):
        micro_batches(range(16), 0, 1, 7)
    with pytest.raises(InputError, match="cannot be shared by 32"):
        micro_batches(range(16), 0, 32)


def test_a_rank_of_very_many_computes_its_own_windows_only() -> None:
    spans = [Span(i, 0, 500, (True,)) for i in range(300)]
    plan = Plan(spans, 0, 64, 10**7, 2**14)
    asked = []
    original = plan.windows
    plan.windows = lambda epoch, indices: asked.append(len(indices)) or original(epoch, indices)  # type: ignore
    mine = plan.micro_batch(5, Part(7, 1024))
    assert asked == [16] and mine == plan.batch(0, 5)[7 * 16 : 8 * 16]
