"""What predicts whole runs, against float64 and one (run, subject) pair at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.scoring.conftest import make_anchor, make_flow, make_study
from tests.scoring.test_score import ALONE, BOTH, pearson
from trainer.data.batches import Batch, whole_runs
from trainer.data.study import Study
from trainer.models.flow import SITE_NOISE, SITE_START, SITE_TIME, START_FRACTION, FlowMatching
from trainer.models.randomness import fold_in, make_keys, normal, uniform
from trainer.scoring.predictor import LOSS_DRAWS, SCORING_EPOCH, FlowPredictor
from trainer.scoring.sets import score_set


def make_predictor(study: Study) -> FlowPredictor:
    return FlowPredictor(make_anchor(study), make_flow(study), study.config, BOTH)


def batches(study: Study) -> list[Batch]:
    context = study.config.data.context_trs
    return list(whole_runs(study.shards, study.spans["val"], study.streams, context=context))


def key_of(study: Study, batch: Batch, subject: int) -> torch.Tensor:
    return make_keys(study.config.seed, SCORING_EPOCH, batch.windows, torch.tensor([subject]))


def test_each_subject_is_predicted_as_if_it_were_alone_and_an_absent_one_not_at_all(study: Study) -> None:
    predictor, options = make_predictor(study), study.config.stage2
    batch = batches(study)[1]
    assert batch.subject_mask[0].tolist() == [True, True, False, True]
    with torch.no_grad():
        mu = predictor.anchor(batch.features, batch.mask)
    batch.bold[0, 2] = torch.nan
    pairs = predictor.predict(batch)
    for subject in (0, 1, 3):
        arguments = (mu[:, subject], batch.mask, torch.tensor([subject]), key_of(study, batch, subject))
        wanted = {
            "anchor": mu[:, subject],
            "mean": predictor.flow.posterior_mean(*arguments, n_draws=options.posterior_draws),
            "sample": predictor.flow.sample(*arguments, temperature=options.temperature),
        }
        for name, alone in wanted.items():
            torch.testing.assert_close(pairs[name][0][:, subject], alone, rtol=0, atol=1e-5)
            assert torch.equal(pairs[name][1][:, subject], batch.bold[:, subject])
    for name, (prediction, _) in pairs.items():
        assert not prediction[0, 2].any(), name
        assert prediction[0, 0].any(), name


def test_estimates_that_nobody_asked_for_are_not_computed(study: Study) -> None:
    predictor = FlowPredictor(make_anchor(study), make_flow(study), study.config, ("mean",))
    assert sorted(predictor.predict(batches(study)[0])) == ["anchor", "anchor_subspace", "mean", "mean_subspace"]


def test_r_inside_the_subspace_is_that_of_projections_in_float64(study: Study) -> None:
    predictor = make_predictor(study)
    found = score_set(predictor, study, "val", ALONE).correlations
    mean, basis = predictor.flow.latent.mean.double(), predictor.flow.latent.basis.double()
    for name in ("anchor", *BOTH):
        x: list[list[np.ndarray]] = [[] for _ in study.manifest.subjects]
        y: list[list[np.ndarray]] = [[] for _ in study.manifest.subjects]
        for batch in batches(study):
            prediction, _ = predictor.predict(batch)[name]
            for s in batch.subject_mask[0].nonzero()[:, 0].tolist():
                for parts, values in ((x, prediction[0, s]), (y, batch.bold[0, s])):
                    parts[s].append(((values.double() - mean[s]) @ basis.T @ basis).numpy())
        np.testing.assert_allclose(found[f"{name}_subspace"].r, pearson(x, y), rtol=0, atol=1e-5)
        assert abs(found[f"{name}_subspace"].overall - found[name].overall) > 1e-3


def loss_by_hand(study: Study, flow: FlowMatching, batch: Batch, mu: torch.Tensor) -> tuple[float, int]:
    """Sum over (subject, TR) of mean over dimensions of (v - u)^2, mean of the draws: float64 but for the network."""
    latent, sigma, trs = flow.latent, study.config.stage2.cfm.sigma_min, batch.bold.shape[2]
    total, count, padded = 0.0, 0, -(-trs // flow.length_factor) * flow.length_factor
    basis, scale = latent.basis.double().numpy(), latent.scale.double().numpy()
    for s in np.flatnonzero(batch.subject_mask[0].numpy()):
        mean = latent.mean[s].double().numpy()
        x1, around = (
            np.pad((values[0, s].double().numpy() - mean) @ basis.T / scale, ((0, padded - trs), (0, 0)))
            for values in (batch.bold, mu)
        )
        for draw in range(LOSS_DRAWS):
            key = fold_in(key_of(study, batch, int(s)), draw)
            z = normal(key, SITE_NOISE, (padded, flow.latent_dim))[0].double().numpy()
            t = 0.0 if float(uniform(key, SITE_START)) < START_FRACTION else float(uniform(key, SITE_TIME))
            y = (1 - (1 - sigma) * t) * z + t * x1
            u = x1 - (1 - sigma) * z
            as_network = [torch.from_numpy(values.T).float()[None] for values in (y, around)]
            valid = (torch.arange(padded) < trs).float()[None, None]
            with torch.no_grad():
                v = flow.velocity(
                    as_network[0], valid, as_network[1], torch.tensor([t]), torch.tensor([int(s)]), key
                )[0].double().numpy().T  # fmt: skip
            for tr in range(trs):
                total += sum((v[tr, d] - u[tr, d]) ** 2 for d in range(flow.latent_dim)) / flow.latent_dim / LOSS_DRAWS
        count += trs
    return total, count


@pytest.mark.parametrize("context", [0, 3])
def test_the_flow_loss_is_the_formulas(tiny_shards: Path, debug_config: Path, context: int) -> None:
    study = make_study(tiny_shards, debug_config, f"data.context_trs={context}")
    study.spans["val"] = study.spans["val"][-3:]
    predictor = make_predictor(study)
    total, count = 0.0, 0
    for batch in batches(study):
        with torch.no_grad():
            mu = predictor.anchor(batch.features, batch.mask)[:, :, batch.scored()]
        part, trs = loss_by_hand(study, predictor.flow, batch.cut(batch.scored()), mu)
        assert predictor.loss(batch) == (pytest.approx(part, rel=1e-5), trs)
        total, count = total + part, count + trs
    assert count == sum(len(span) * sum(span.subjects) for span in study.spans["val"])
    assert score_set(predictor, study, "val", ALONE).flow_loss == pytest.approx(total / count, rel=1e-5)
