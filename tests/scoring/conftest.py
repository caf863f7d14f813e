"""A study of the tiny shards whose validation runs lack subjects, and the models of both stages around it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from trainer.config import load_config
from trainer.data.batches import whole_runs
from trainer.data.study import Study
from trainer.models.anchor import Anchor
from trainer.models.build import build_anchor, build_flow
from trainer.models.flow import FlowMatching
from trainer.models.latent import CovarianceAccumulator
from trainer.scoring.predictor import shapes_of

SMALL = [f"stage2.{key}" for key in ("decoder.channels=[8]", "latent_dim=4", "n_timesteps=2", "posterior_draws=2")]


def make_study(shards: Path, config: Path, *overrides: str) -> Study:
    """Seven runs to score: the second lacks the third subject, two lack another one, the last is cut at both ends."""
    study = Study(load_config(config, [f"data.shards={shards}", *SMALL, *overrides]))
    spans = study.spans["train"]
    spans[1] = replace(spans[1], subjects=(True, True, False, True))
    spans[-1] = replace(spans[-1], start=9, stop=33)
    assert sum(not all(span.subjects) for span in spans) == 3
    study.spans["val"] = spans
    return study


def make_anchor(study: Study) -> Anchor:
    """An anchor that was not trained, but says something else in each TR."""
    torch.manual_seed(1)
    return build_anchor(study.config.stage1.model, shapes_of(study)).eval()


def make_flow(study: Study) -> FlowMatching:
    """A flow with random weights, its last layer too, in a latent of the study's BOLD."""
    torch.manual_seed(2)
    flow = build_flow(study.config, shapes_of(study)).eval()
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    if study.config.stage2.projection == "pca":
        covariance = CovarianceAccumulator(len(study.manifest.subjects), study.manifest.parcels)
        for batch in whole_runs(study.shards, study.spans["val"], []):
            for subject in batch.subject_mask[0].nonzero()[:, 0].tolist():
                covariance.update(batch.bold[0, subject], subject)
        flow.fit_latent(covariance)
        flow.latent.residual_std.fill_(0.5)
    return flow


@pytest.fixture
def study(tiny_shards: Path, debug_config: Path) -> Study:
    return make_study(tiny_shards, debug_config)
