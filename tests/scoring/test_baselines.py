"""Gaussian residuals around the anchor: fitted on what it has not seen, drawn as they were fitted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.ranks import on_ranks
from tests.scoring.conftest import make_anchor, make_study
from tests.scoring.test_score import ALONE
from trainer.data.batches import whole_runs
from trainer.data.study import Study
from trainer.errors import InputError
from trainer.run.directory import StageDirectory
from trainer.scoring import baselines
from trainer.scoring.baselines import ResidualModel, fit, fit_residuals, shrunk_correlation, unseen

PHI = np.array([0.7, 0.2, -0.3])
SCALE = np.array([1.0, 2.0, 0.5])
CORRELATION = np.array([[1.0, 0.6, 0.2], [0.6, 1.0, -0.4], [0.2, -0.4, 1.0]])
CPU = torch.device("cpu")


def simulate(n_trs: int, seed: int = 0) -> np.ndarray:
    """An AR(1) process by its definition, long after its start."""
    rng = np.random.default_rng(seed)
    noise = rng.multivariate_normal(np.zeros(3), CORRELATION * np.outer(SCALE, SCALE), n_trs + 100)
    series = np.zeros_like(noise)
    for t in range(1, len(noise)):
        series[t] = PHI * series[t - 1] + noise[t]
    return series[100:]


def test_the_process_that_made_the_residuals_is_found() -> None:
    runs = [simulate(6000, 0), simulate(9000, 1)]
    model = fit(lambda: runs)
    assert model is not None
    np.testing.assert_allclose(model.phi, PHI, atol=0.03)
    np.testing.assert_allclose(model.scale, SCALE, rtol=0.03)
    np.testing.assert_allclose(model.correlation, CORRELATION, atol=0.03)


@pytest.mark.parametrize("full", [False, True])
def test_draws_have_the_covariance_and_the_memory_that_were_fitted_from_the_first_tr_on(full: bool) -> None:
    model = ResidualModel(PHI, SCALE, CORRELATION)
    drawn = model.draw(40_000, 4, np.random.default_rng(0), full=full)
    between = CORRELATION if full else np.eye(3)
    stationary = np.outer(SCALE, SCALE) * between / (1 - np.outer(PHI, PHI))
    for t in range(4):
        np.testing.assert_allclose(drawn[:, t].T @ drawn[:, t] / 40_000, stationary, atol=0.08)
    for t in range(3):
        lagged = (drawn[:, t] * drawn[:, t + 1]).mean(axis=0)
        np.testing.assert_allclose(lagged / np.diagonal(stationary), PHI, atol=0.03)


def test_both_baselines_come_from_the_same_numbers() -> None:
    model = ResidualModel(PHI, SCALE, np.eye(3))
    one, other = (model.draw(2, 5, np.random.default_rng(7), full=full) for full in (False, True))
    np.testing.assert_array_equal(one, other)


def shrunk_by_loops(x: np.ndarray) -> tuple[np.ndarray, float]:
    """Ledoit and Wolf's estimate (2004, lemma 3.2 to 3.5), with loops over rows."""
    n, p = x.shape
    s = sum(np.outer(row, row) for row in x) / n
    m = np.trace(s) / p
    d = ((s - m * np.eye(p)) ** 2).sum() / p
    b = min(d, sum(((np.outer(row, row) - s) ** 2).sum() for row in x) / n**2 / p)
    return b / d * m * np.eye(p) + (d - b) / d * s, b / d


@pytest.mark.parametrize("n", [4, 30, 500])
def test_the_covariance_is_shrunk_as_ledoit_and_wolf_do(n: int) -> None:
    x = simulate(n)
    x = x / np.sqrt((x**2).mean(axis=0))
    wanted, amount = shrunk_by_loops(x)
    found = shrunk_correlation([x[: n // 2], x[n // 2 :]], 3)
    size = np.sqrt(np.diagonal(wanted))
    np.testing.assert_allclose(found, wanted / np.outer(size, size), atol=1e-9)
    assert (amount > 0.3) == (n == 4)


def test_more_parcels_than_trs_are_positive_definite_with_zeros_and_twins_among_them() -> None:
    rng = np.random.default_rng(0)
    run = rng.normal(size=(12, 40)).astype(np.float32).astype(np.float64)
    run[:, 3] = 0.0
    run[:, 5] = run[:, 6]
    model = fit(lambda: [run])
    assert model is not None
    drawn = model.draw(3, 9, rng, full=True)
    assert np.isfinite(drawn).all()
    assert not drawn[:, :, 3].any()


def test_what_is_no_number_is_passed_over_with_the_tr_that_follows() -> None:
    run = simulate(300)
    spoilt = np.insert(run, 100, np.nan, axis=0)
    with_hole, in_two = fit(lambda: [spoilt]), fit(lambda: [run[:100], run[100:]])
    assert with_hole is not None
    assert in_two is not None
    for name in ("phi", "scale", "correlation"):
        np.testing.assert_allclose(getattr(with_hole, name), getattr(in_two, name), atol=1e-12)
    assert fit(lambda: [np.full((9, 3), np.nan), run[:1]]) is None


@pytest.fixture
def stage(tmp_path: Path) -> StageDirectory:
    return StageDirectory(tmp_path / "run" / "stage2")


def store(stage: StageDirectory, study: Study, *sets: str) -> None:
    """Predictions of the runs of some sets (train), of which one is BOLD + 2 and the others are BOLD + 1."""
    folder = stage.anchor / "predictions"
    folder.mkdir(parents=True)
    for span in (span for name in sets or ("train",) for span in study.spans[name]):
        whole = replace(span, start=0, stop=study.manifest.samples[span.sample].n_trs)
        (batch,) = whole_runs(study.shards, [whole], [])
        shift = 2.0 if span == study.spans["train"][0] else 1.0
        np.save(folder / f"{study.manifest.samples[span.sample].key}.npy", batch.bold[0].numpy() + shift)


def test_cross_fitted_predictions_are_what_the_anchor_has_not_seen(study: Study, stage: StageDirectory) -> None:
    store(stage, study)
    found = unseen(stage, study)
    assert found is not None
    assert found.spans == study.spans["train"]
    runs = list(found.residuals(study, make_anchor(study), 2, CPU))
    assert [len(run) for run in runs] == [len(span) for span in study.spans["train"] if span.subjects[2]]
    np.testing.assert_allclose(runs[0], -2.0, atol=1e-5)
    np.testing.assert_allclose(np.concatenate(runs[1:]), -1.0, atol=1e-5)


def test_none_of_the_cross_fitted_predictions_may_be_missing(study: Study, stage: StageDirectory) -> None:
    store(stage, study)
    next((stage.anchor / "predictions").iterdir()).unlink()
    with pytest.raises(InputError, match="npy: missing"):
        unseen(stage, study)


def test_no_more_trs_are_taken_than_a_fit_needs(
    study: Study, stage: StageDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    store(stage, study)
    found = unseen(stage, study)
    assert found is not None
    monkeypatch.setattr(baselines, "MOST_TRS", 150)
    runs = list(found.residuals(study, make_anchor(study), 0, CPU))
    assert 100 < sum(map(len, runs)) <= 160
    assert len(runs) == 3


@pytest.mark.parametrize("context", [0, 3])
def test_without_cross_fit_the_anchor_predicts_the_first_halves_of_the_validation_runs(
    tiny_shards: Path, debug_config: Path, stage: StageDirectory, context: int
) -> None:
    study = make_study(tiny_shards, debug_config, "stage2.cross_fit=0", f"data.context_trs={context}")
    store(stage, study)
    found = unseen(stage, study)
    assert found is not None
    assert "first half of each run of val" in found.where
    assert [(span.sample, span.start) for span in found.spans] == [(s.sample, s.start) for s in study.spans["val"]]
    anchor = make_anchor(study)
    runs = list(found.residuals(study, anchor, 0, CPU))
    span = found.spans[-1]
    assert (span.start, span.stop) == (9, 21)
    (batch,) = whole_runs(study.shards, [replace(span, start=0, stop=51)], study.streams)
    first = span.start - context
    with torch.no_grad():
        seen = slice(first, span.stop + context)
        mu = anchor([f[:, seen] for f in batch.features], batch.mask[:, seen])[0, 0, context : context + len(span)]
    np.testing.assert_allclose(runs[-1], (batch.bold[0, 0, 9:21] - mu).numpy(), atol=1e-5)


def test_an_imported_run_has_the_validation_set_and_a_refit_without_folds_has_nothing(
    tiny_shards: Path, debug_config: Path, study: Study, stage: StageDirectory
) -> None:
    assert "first half" in unseen(stage, study).where  # type: ignore[union-attr]
    assert unseen(stage.refit, study) is None
    store(stage.refit, study, "train", "val")
    found = unseen(stage.refit, study)
    assert found is not None
    assert found.spans[0] in study.spans["train"]
    assert unseen(stage.refit, make_study(tiny_shards, debug_config, "stage2.cross_fit=0")) is None


def test_any_number_of_ranks_fits_the_same_bits(study: Study, stage: StageDirectory) -> None:
    found = unseen(stage, study)
    assert found is not None
    anchor = make_anchor(study)
    for span in found.spans:
        assert span.subjects[0]
    spans = [replace(span, subjects=(*span.subjects[:3], False)) for span in found.spans]
    found = replace(found, spans=spans)
    wanted = fit_residuals(found, study, anchor, ALONE)
    assert [model is None for model in wanted] == [False, False, False, True]
    for world in (2, 3):
        for models in on_ranks(world, lambda rank: fit_residuals(found, study, anchor, rank)):
            for model, other in zip(models[:3], wanted[:3], strict=True):
                np.testing.assert_array_equal(model.phi, other.phi)  # type: ignore[union-attr]
                np.testing.assert_array_equal(model.correlation, other.correlation)  # type: ignore[union-attr]
