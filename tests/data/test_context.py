"""With context in sight, a window's TRs are predicted as in the whole run, and only its own TRs are learnt from."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.conftest import Invented
from trainer.config import Filter
from trainer.data.batches import make_batch, whole_runs
from trainer.data.loader import Reading, training_batches
from trainer.data.plan import Plan, Span, Window, select
from trainer.data.shards import Shards
from trainer.data.statistics import NO_SCALING
from trainer.models.anchor import Anchor, anchor_loss
from trainer.scoring.predictor import AnchorPredictor
from trainer.training.phases import AnchorObjective

ALL = (True, True, True)
STREAMS = [(1, 4), (2, 3), (1, 5)]


def an_anchor(kernel: int, causal: bool = False) -> Anchor:
    torch.manual_seed(1)
    anchor = Anchor(STREAMS, 3, 6, embed_dim=8, encoder_kernel_size=kernel, encoder_causal=causal)
    return anchor.double().eval()


def predict(anchor: Anchor, features: list[torch.Tensor], mask: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return anchor([f.double() for f in features], mask)


@settings(max_examples=40, deadline=None)
@given(
    start=st.integers(0, 29),
    length=st.integers(1, 30),
    kernel=st.sampled_from([1, 5, 11, 21, 45]),
    more=st.integers(0, 3),
    causal=st.booleans(),
)
def test_a_window_with_context_is_predicted_as_in_the_whole_run(
    invented_shards: Shards, start: int, length: int, kernel: int, more: int, causal: bool
) -> None:
    streams, stop = invented_shards.manifest.streams, min(start + length, 30)
    anchor = an_anchor(kernel, causal)
    (run,) = whole_runs(invented_shards, [Span(0, 0, 30, ALL)], streams)
    expected = predict(anchor, run.features, run.mask)[0, :, start:stop]
    context = (kernel - 1) // 2 + more
    batch = make_batch(
        invented_shards, [Window(0, 0, start, stop, ALL)], streams, sample_length=length, context=context
    )
    found = predict(anchor, batch.features, batch.mask)[0][:, batch.loss_mask[0]]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_too_little_context_is_seen_at_the_edges(invented_shards: Shards) -> None:
    streams, anchor = invented_shards.manifest.streams, an_anchor(11)
    (run,) = whole_runs(invented_shards, [Span(0, 0, 30, ALL)], streams)
    expected = predict(anchor, run.features, run.mask)[0, :, 10:20]
    batch = make_batch(invented_shards, [Window(0, 0, 10, 20, ALL)], streams, context=2)
    found = predict(anchor, batch.features, batch.mask)[0][:, batch.loss_mask[0]]
    assert (found - expected).abs().max() > 1e-4


def test_context_reaches_beyond_the_span_to_the_ends_of_the_run_and_without_bold(
    invented_shards: Shards, invented_source: Invented
) -> None:
    streams = invented_shards.manifest.streams
    windows = [Window(0, 0, 2, 10, ALL), Window(1, 0, 22, 29, ALL)]
    batch = make_batch(invented_shards, windows, streams, sample_length=8, context=4)
    assert batch.mask.shape == (2, 16) and batch.bold.shape[2] == 16
    assert batch.mask[0].tolist() == [False] * 2 + [True] * 14
    assert batch.mask[1].tolist() == [True] * 12 + [False] * 4
    assert batch.loss_mask[0].tolist() == [False] * 4 + [True] * 8 + [False] * 4
    assert batch.loss_mask[1].tolist() == [False] * 4 + [True] * 7 + [False] * 5
    audio = invented_source.features["alpha_1", "Audio"][:, 0]
    np.testing.assert_array_equal(batch.features[2][0, 2:].numpy(), audio[:14])
    np.testing.assert_array_equal(batch.features[2][1, :10].numpy(), audio[18:28])
    assert not batch.bold[~batch.loss_mask[:, None].expand(-1, 3, -1)].any()
    bold = invented_source.bold["alpha_1", 1, "a"]
    np.testing.assert_array_equal(batch.bold[0, 0, 4:12].numpy(), bold[2:10])


def test_the_loss_ignores_the_context(invented_shards: Shards) -> None:
    plan = Plan(select(invented_shards.manifest, Filter()), 3, 8, 16, 4)
    reading = Reading(invented_shards.manifest.streams, NO_SCALING, context=5)
    batch = next(training_batches(invented_shards, plan, reading))
    assert batch.mask.sum() > batch.loss_mask.sum() == 4 * 8
    prediction = torch.zeros_like(batch.bold)
    loss = anchor_loss(prediction, batch.bold, batch.loss_mask, batch.subject_mask, count=1)
    prediction.movedim(2, 0)[:5] = 1e3
    prediction.movedim(2, 0)[13:] = 1e3
    assert torch.equal(anchor_loss(prediction, batch.bold, batch.loss_mask, batch.subject_mask, count=1), loss)


@pytest.mark.parametrize("trs", [[10, 20], [0, 12], [15, None], [None, None]])
def test_a_span_that_was_cut_out_is_scored_with_the_run_around_it(
    invented_shards: Shards, trs: list[int | None]
) -> None:
    streams, anchor = invented_shards.manifest.streams, an_anchor(11)
    span = select(invented_shards.manifest, Filter(runs=["alpha_1"], trs=trs))[0]
    (run,) = whole_runs(invented_shards, [Span(0, 0, 30, ALL)], streams)
    expected = predict(anchor, run.features, run.mask)[0, :, span.start : span.stop]
    (batch,) = whole_runs(invented_shards, [span], streams, context=5)
    assert batch.mask.all()
    assert batch.mask.shape[1] == min(span.stop + 5, 30) - max(span.start - 5, 0)
    found = predict(anchor, batch.features, batch.mask)[0, :, batch.scored()]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    (plain,) = whole_runs(invented_shards, [span], streams)
    cut = batch.cut(batch.scored())
    assert torch.equal(cut.bold, plain.bold) and torch.equal(cut.features[1], plain.features[1])
    assert torch.equal(cut.mask, plain.mask)


def test_predictors_see_the_context_and_predict_without_it(invented_shards: Shards) -> None:
    streams, anchor = invented_shards.manifest.streams, an_anchor(11)
    (run,) = whole_runs(invented_shards, [Span(0, 0, 30, ALL)], streams)
    expected = predict(anchor, run.features, run.mask)[:, :, 10:20]
    (batch,) = whole_runs(invented_shards, [Span(0, 10, 20, ALL)], streams, context=5)
    (plain,) = whole_runs(invented_shards, [Span(0, 10, 20, ALL)], streams)
    batch.features = [f.double() for f in batch.features]
    prediction, target = AnchorPredictor(anchor).predict(batch)["mean"]
    torch.testing.assert_close(prediction, expected, rtol=0, atol=1e-6)
    assert torch.equal(target, plain.bold)


def test_the_objective_counts_the_trs_that_are_learnt_from(invented_shards: Shards) -> None:
    plan = Plan(select(invented_shards.manifest, Filter()), 3, 8, 16, 4)
    batch = next(
        training_batches(invented_shards, plan, Reading(invented_shards.manifest.streams, NO_SCALING, context=5))
    )
    batch.features = [f.double() for f in batch.features]
    inside = batch.loss_mask[:, None] & batch.subject_mask[..., None]
    error = (predict(an_anchor(11), batch.features, batch.mask).float() - batch.bold).square().mean(-1)
    assert plan.terms(0) == inside.sum() == 8 * batch.subject_mask.sum()
    torch.testing.assert_close(AnchorObjective(an_anchor(11), 0)(batch, 0, plan.terms(0)), error[inside].mean())
