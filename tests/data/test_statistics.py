"""Which columns count as constant."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.config import Filter
from trainer.data.manifest import BOLD, Stream
from trainer.data.plan import select
from trainer.data.shards import Shards
from trainer.data.statistics import BoldScaling, columns_of, feature_statistics, hardly_varies, median_std


@given(st.lists(st.floats(1e-3, 1e3), min_size=3, max_size=30), st.integers(0, 60))
def test_columns_below_the_floor_are_told_whatever_the_others_are(sizes: list[float], n_constant: int) -> None:
    faint = [min(sizes) * 1e-6]
    std = np.array([*sizes, *faint, *[0.0] * n_constant])
    order = np.random.default_rng(len(sizes)).permutation(len(std))
    found = hardly_varies(np.zeros(len(std)), std[order])
    expected = std < 1e-4 * np.median([*sizes, *faint])
    assert np.array_equal(found, expected[order])
    assert found.sum() >= 1 + n_constant


@pytest.mark.parametrize(
    ("mean", "std", "expected"),
    [
        ([0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [True, True, True]),
        ([5.0, 5.0, 0.0], [0.0, 2e-7, 1.0], [True, True, False]),
        ([1e6, 1e6, 1e6], [1e-3, 1e-3, 1e-3], [True, True, True]),
        ([0.0, 0.0, 0.0], [1e-9, 1e-9, 1e-9], [False, False, False]),
        ([0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1e-9], [True, True, True, False]),
        ([0.0, 0.0, 0.0], [0.9e-4, 1.0, 1.0], [True, False, False]),
        ([0.0, 0.0, 0.0], [1.1e-4, 1.0, 1.0], [False, False, False]),
        ([1e4, 0.0, 0.0], [1.0, 1e4, 1.0], [False, False, False]),
    ],
)
def test_what_hardly_varies(mean: list[float], std: list[float], expected: list[bool]) -> None:
    assert hardly_varies(np.array(mean), np.array(std)).tolist() == expected


def test_each_row_has_its_own_median() -> None:
    std = np.array([[1.0, 1.0, 1e-6], [1e-6, 1e-6, 1e-6], [0.0, 0.0, 0.0]])
    assert hardly_varies(np.zeros_like(std), std).tolist() == [[False, False, True], [False] * 3, [True] * 3]
    assert median_std(np.zeros_like(std), std).tolist() == [[1.0], [1e-6], [0.0]]


def test_columns_are_named_by_stream_even_where_a_stream_has_a_colon() -> None:
    keep = ["a:b/c:3", "a/b:1", "a/b:10"]
    assert columns_of(Stream("a:b/c", 1, 4, "float32"), keep) == [3]
    assert columns_of(Stream("a/b", 1, 20, "float32"), keep) == [1, 10]
    assert columns_of(Stream("b", 1, 4, "float32"), keep) == []
    assert columns_of(Stream("b", 1, 4, "float32"), None) is None


def test_statistics_without_a_faint_column_are_those_before_the_rule(invented_shards: Shards) -> None:
    spans, streams = select(invented_shards.manifest, Filter(trs=[2, -3])), invented_shards.manifest.streams
    for old, new in zip(
        feature_statistics(invented_shards, spans, streams),
        feature_statistics(invented_shards, spans, streams, keep=[]),
        strict=True,
    ):
        assert all(torch.equal(a, b) for a, b in zip(old, new, strict=True))
    for mode in ("run", "subject"):
        old_scale, new_scale = (BoldScaling.fit(mode, invented_shards, spans, k).scale for k in (None, []))
        assert old_scale is not None and new_scale is not None
        there = invented_shards.manifest.moments(BOLD).count > 0
        kept = there if mode == "run" else there.any(0)
        assert np.array_equal(old_scale[kept], new_scale[kept])


def test_a_subject_without_training_trs_is_z_scored_over_all_of_its_trs(invented_shards: Shards) -> None:
    spans = select(invented_shards.manifest, Filter())
    training = [replace(span, subjects=(True, False, True)) for span in spans]
    scaling = BoldScaling.fit("subject", invented_shards, training)
    rows = [invented_shards.read(s.sample, BOLD, s.start, s.stop, row=1) for s in spans if s.subjects[1]]
    union = np.concatenate(rows).astype(np.float64)
    assert scaling.mean is not None and scaling.scale is not None
    np.testing.assert_allclose(scaling.mean[1], union.mean(0), rtol=1e-5)
    np.testing.assert_allclose(scaling.scale[1], union.std(0), rtol=1e-5)
