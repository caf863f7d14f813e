"""Folds cover every TR once, keep showings of a stimulus together, and no anchor predicts what it has seen."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ranks import ThreadRank, on_ranks
from tests.training.conftest import constant_anchor
from trainer.config import Filter
from trainer.data.batches import whole_runs
from trainer.data.plan import Span, select
from trainer.data.study import Study
from trainer.models.build import build_anchor
from trainer.scoring.predictor import shapes_of
from trainer.scoring.shares import OneProcess
from trainer.training import crossfit

EVERYONE = (True, True)
ALONE = OneProcess(torch.device("cpu"))


def trs(spans: list[Span]) -> set[tuple[int, int]]:
    return {(span.sample, tr) for span in spans for tr in range(span.start, span.stop)}


@settings(max_examples=50)
@given(st.integers(2, 20), st.integers(2, 6))
def test_folds_deal_every_tr_once(k_runs: int, k: int) -> None:
    manifest = SimpleNamespace(samples=[SimpleNamespace(series="f", run=f"r{i // 2}") for i in range(k_runs)])
    spans = [Span(i, 3 * i, 3 * i + 20 + i, EVERYONE) for i in range(k_runs)]
    dealt = crossfit.folds(spans, manifest, k)
    assert len(dealt) == k
    assert sum(len(span) for fold in dealt for span in fold) == sum(map(len, spans))
    assert set().union(*(trs(fold) for fold in dealt)) == trs(spans)
    for fold in dealt:
        assert trs(crossfit.without(spans, fold)) == trs(spans) - trs(fold)


def test_showings_of_one_stimulus_stay_together(study: Study) -> None:
    spans = select(study.manifest, Filter())
    for fold in crossfit.folds(spans, study.manifest, 4):
        here = {study.manifest.samples[span.sample].run for span in fold}
        for run in here:
            showings = [i for i, sample in enumerate(study.manifest.samples) if sample.run == run]
            assert {span.sample for span in fold} >= set(showings)


def test_each_tr_is_predicted_by_the_anchor_of_its_fold(study: Study, tmp_path: Path) -> None:
    spans = study.spans["train"][:2]
    first, second = crossfit.folds(spans[:1], study.manifest, 2)
    anchors = [constant_anchor(study, value) for value in (1.0, 2.0)]
    batch = next(iter(whole_runs(study.shards, spans[:1], study.streams)))
    levels = [anchor(batch.features)[0, 0, 0, 0].item() for anchor in anchors]
    assert levels[0] != levels[1]
    predictions = crossfit.Predictions(tmp_path, study)
    predictions.write([(anchors[0], first), (anchors[1], second)], ALONE)
    found = predictions[spans[0].sample]
    assert (found[:, first[0].start : first[0].stop] == levels[0]).all()
    assert (found[:, second[0].start : second[0].stop] == levels[1]).all()
    assert list(predictions) == [spans[0].sample]
    assert len(predictions) == 1


def test_trs_outside_the_spans_are_not_predicted(study: Study, tmp_path: Path) -> None:
    span = study.spans["train"][0]
    part = Span(span.sample, 5, 9, span.subjects)
    predictions = crossfit.Predictions(tmp_path, study)
    predictions.write([(constant_anchor(study, 1.0), [part])], ALONE)
    found = predictions[span.sample]
    assert np.isfinite(found[:, 5:9]).all()
    assert np.isnan(found[:, :5]).all()
    assert np.isnan(found[:, 9:]).all()


def test_ranks_share_the_samples_and_keep_the_files_that_are_there(study: Study, tmp_path: Path) -> None:
    spans = study.spans["train"]
    torch.manual_seed(0)
    anchor = build_anchor(study.config.stage1.model, shapes_of(study))
    alone = crossfit.Predictions(tmp_path / "alone", study)
    alone.write([(anchor, spans)], ALONE)
    looked: list[int] = []
    written: list[tuple[int, int]] = []

    class Watched(crossfit.Predictions):
        rank = -1

        def _missing(self, *arguments: Any) -> list[int]:
            looked.append(self.rank)
            return super()._missing(*arguments)

        def _write_sample(self, sample: int, *arguments: Any) -> None:
            written.append((self.rank, sample))
            super()._write_sample(sample, *arguments)

    def write(rank: ThreadRank, wanted: list[Span]) -> None:
        predictions = Watched(tmp_path / "shared", study)
        predictions.rank = rank.rank
        predictions.write([(anchor, wanted)], rank)
        assert list(predictions) == sorted(span.sample for span in wanted), "all are there before any rank goes on"

    on_ranks(2, lambda rank: write(rank, spans[1:3]))
    first = [spans[1].sample, spans[2].sample]
    assert sorted(written) == [(0, first[0]), (1, first[1])]
    written.clear()
    on_ranks(3, lambda rank: write(rank, spans))
    missing = [span.sample for span in spans if span.sample not in first]
    assert sorted(written) == sorted((i % 3, sample) for i, sample in enumerate(missing))
    assert looked == [0, 0], "one look at the disk each time, for all"
    shared = crossfit.Predictions(tmp_path / "shared", study)
    for sample in alone:
        np.testing.assert_array_equal(shared[sample], alone[sample])
    assert sorted(path.name for path in shared.folder.iterdir()) == sorted(p.name for p in alone.folder.iterdir())
