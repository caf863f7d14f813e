"""Stage 2's latent is the same on all ranks, exact for few parcels, and nearly so for many; a wish to end is heard."""

from __future__ import annotations

import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.ranks import ThreadRank, on_ranks
from tests.training.conftest import constant_anchor
from trainer.config import load_config
from trainer.data.batches import whole_runs
from trainer.data.manifest import BOLD
from trainer.data.study import Study
from trainer.errors import InputError
from trainer.models.build import build_flow
from trainer.models.latent import CovarianceAccumulator, Latent
from trainer.progress import listening
from trainer.run.signals import Interrupted, StopRequest
from trainer.scoring.predictor import shapes_of
from trainer.scoring.shares import OneProcess, Ranks
from trainer.training import latent as fits
from trainer.training.crossfit import Predictions
from trainer.training.latent import fit_latent, latent_range

ALONE = OneProcess(torch.device("cpu"))
Buffers = dict[str, torch.Tensor]


@pytest.fixture
def wide(wide_config: Path) -> Study:
    return Study(load_config(wide_config))


def fitted(
    study: Study, rank: Ranks, predictions: Predictions | None = None, stop: StopRequest | None = None
) -> Buffers:
    flow = build_flow(study.config, shapes_of(study))
    fit_latent(flow, study, study.spans["train"], predictions, rank, stop)
    return flow.latent.state_dict()


def residuals(study: Study) -> torch.Tensor:
    """(TRs, V) float64: the training BOLD of all subjects, each centred on its mean."""
    series: dict[int, list[torch.Tensor]] = {}
    for batch in whole_runs(study.shards, study.spans["train"], []):
        for subject in batch.subject_mask[0].nonzero()[:, 0].tolist():
            series.setdefault(subject, []).append(batch.bold[0, subject].double())
    return torch.cat([x - x.mean(0) for x in map(torch.cat, series.values())])


def test_up_to_5000_parcels_the_latent_is_that_of_the_covariance_to_the_bit(study: Study) -> None:
    covariance = CovarianceAccumulator(len(study.manifest.subjects), study.manifest.parcels)
    for batch in whole_runs(study.shards, study.spans["train"], []):
        for subject in batch.subject_mask[0].nonzero()[:, 0].tolist():
            covariance.update(batch.bold[0, subject], subject)
    assert fits.EXACT_PARCELS == 5000
    wanted, found = covariance.fit(study.config.stage2.latent_dim).state_dict(), fitted(study, ALONE)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_the_search_finds_the_latent_of_the_covariance(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So few parcels are spanned by the search's vectors, and the search is exact."""
    predictions = Predictions(tmp_path, study)
    predictions.write([(constant_anchor(study, 0.3), study.spans["train"])], ALONE)
    exact = fitted(study, ALONE, predictions)
    monkeypatch.setattr(fits, "EXACT_PARCELS", 0)
    monkeypatch.setattr(fits, "BLOCK_BYTES", 8 * study.manifest.parcels * 7)  # blocks of 7 TRs
    for found in [fitted(study, ALONE, predictions), *on_ranks(3, lambda rank: fitted(study, rank, predictions))]:
        for name, wanted in exact.items():
            assert torch.allclose(found[name], wanted, rtol=1e-5, atol=1e-5), name


def test_many_parcels_have_nearly_the_variance_of_the_exact_components(
    wide: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    predictions = Predictions(tmp_path, wide)
    predictions.write([(constant_anchor(wide, 0.0), wide.spans["train"])], ALONE)
    found, x, d = fitted(wide, ALONE, predictions), residuals(wide), wide.config.stage2.latent_dim
    basis = found["basis"].double()
    variance = (x @ basis.T).square().mean(0)
    exact = torch.linalg.eigvalsh(x @ x.T).flip(0)[:d] / len(x)  # of TR with TR: the same as of parcel with parcel
    assert float(variance.sum() / exact.sum()) > 0.999
    assert torch.allclose(basis @ basis.T, torch.eye(d).double(), atol=1e-6)
    assert torch.allclose(found["scale"].double(), variance.sqrt(), rtol=1e-5)
    assert (basis.gather(1, basis.abs().argmax(1, keepdim=True)) > 0).all()
    means = [
        torch.cat([b.bold[0, s] for b in whole_runs(wide.shards, wide.spans["train"], [])]).mean(0) for s in (0, 1)
    ]
    assert torch.allclose(found["mean"], torch.stack(means), atol=1e-5)
    outside = x + (torch.stack(means).double().repeat_interleave(len(x) // 2, 0))
    outside = outside - outside @ basis.T @ basis
    wanted = outside.unflatten(0, (2, -1)).square().mean(1) / (1 - basis.square().sum(0))
    assert torch.allclose(found["residual_std"].double(), wanted.sqrt(), rtol=1e-4)
    share = float(exact.sum() / x.square().sum(1).mean())
    assert f"4 components hold {share:.1%} of the training BOLD's variance" in capsys.readouterr().out


def test_the_latent_of_many_parcels_is_the_same_on_all_ranks_and_for_any_number_of_them(wide: Study) -> None:
    alone = fitted(wide, ALONE)
    for world in (2, 4):  # of three runs: one of four ranks has none
        first, *others = on_ranks(world, lambda rank: fitted(wide, rank))
        for name, wanted in alone.items():
            assert all(torch.equal(other[name], first[name]) for other in others), name
            assert torch.allclose(first[name], wanted, rtol=1e-6, atol=1e-6), name


def test_another_seed_changes_the_search_and_hardly_its_result(wide: Study, wide_config: Path) -> None:
    one, same, other = (
        fitted(wide, ALONE),
        fitted(wide, ALONE),
        fitted(Study(load_config(wide_config, ["seed=7"])), ALONE),
    )
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["basis"], other["basis"])
    assert torch.allclose(one["scale"], other["scale"], rtol=1e-3)


def wished() -> StopRequest:
    """A wish to end, as SIGTERM leaves one."""
    stop = StopRequest()
    stop._note(signal.SIGTERM, None)
    return stop


@pytest.mark.parametrize("shards", ["study", "wide"])
@pytest.mark.parametrize("world", [1, 3])
def test_a_wish_to_end_is_heard_between_blocks_on_all_ranks(
    shards: str, world: int, request: pytest.FixtureRequest
) -> None:
    data: Study = request.getfixturevalue(shards)

    def fit(rank: Ranks) -> int:
        with pytest.raises(Interrupted, match="SIGTERM before the first step") as raised:
            fitted(data, rank, stop=wished() if rank.is_main else None)
        return raised.value.signum

    ends = [fit(ALONE)] if world == 1 else on_ranks(world, fit)
    assert ends == [signal.SIGTERM] * world


@pytest.mark.parametrize("shards", ["study", "wide"])
def test_each_block_is_a_sign_of_life(shards: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    data: Study = request.getfixturevalue(shards)
    predictions, spans = Predictions(tmp_path, data), data.spans["train"]
    predictions.write([(constant_anchor(data, 0.0), spans)], ALONE)
    signs: list[None] = []
    flow = build_flow(data.config, shapes_of(data))
    with listening(lambda: signs.append(None)):
        fit_latent(flow, data, spans, predictions, ALONE)
        blocks = sum(sum(span.subjects) for span in spans)
        assert len(signs) >= 2 * blocks
        signs.clear()
        latent_range(flow, data, spans, ALONE)
        assert len(signs) == len(spans)


def test_constant_bold_of_many_parcels_is_an_error_on_every_rank(wide: Study) -> None:
    wide.__dict__["scaling"] = SimpleNamespace(apply=lambda bold, sample, subject: bold.fill(0.1))

    def fit(rank: Ranks) -> None:
        with pytest.raises(InputError, match="does not vary"):
            fitted(wide, rank)

    fit(ALONE)
    on_ranks(2, fit)


def test_all_ranks_hold_the_latent_that_one_process_fits(study: Study, tmp_path: Path) -> None:
    spans = study.spans["train"]
    predictions = Predictions(tmp_path, study)
    predictions.write([(constant_anchor(study, 0.0), spans)], ALONE)

    def fit(rank: Ranks) -> tuple[dict[str, torch.Tensor], tuple[float, float]]:
        flow = build_flow(study.config, shapes_of(study))
        # what another rank would have found counts for nothing
        fit_latent(flow, study, spans if rank.is_main else spans[:1], predictions, rank)
        return flow.latent.state_dict(), latent_range(flow, study, spans, rank)

    buffers, span = fit(ALONE)
    assert buffers["residual_std"].min() > 0
    for found, found_range in [*on_ranks(2, fit), *on_ranks(3, fit)]:
        assert found.keys() == buffers.keys()
        for name, wanted in buffers.items():
            assert torch.equal(found[name], wanted), name
        assert found_range == span


def test_every_rank_hears_that_the_bold_does_not_vary(study: Study) -> None:
    study.__dict__["scaling"] = SimpleNamespace(apply=lambda bold, sample, subject: bold.fill(0.0))

    def fit(rank: ThreadRank) -> str:
        with pytest.raises(InputError, match="does not vary") as raised:
            flow = build_flow(study.config, shapes_of(study))
            fit_latent(flow, study, study.spans["train"], None, rank)
        return str(raised.value)

    assert len(set(on_ranks(2, fit))) == 1


def test_the_range_of_the_latents_is_that_of_a_loop_in_float64(study: Study) -> None:
    spans = study.spans["train"]
    flow = build_flow(study.config, shapes_of(study))
    fit_latent(flow, study, spans[:1], None, ALONE)
    latent = flow.latent
    assert isinstance(latent, Latent)
    squares, count = np.zeros(flow.latent_dim), 0
    for span in spans:
        present = study.manifest.samples[span.sample].subjects
        for label in present:
            bold = study.shards.read(span.sample, BOLD, span.start, span.stop, row=present.index(label))
            z = bold.astype(np.float64) @ latent.basis.double().numpy().T / latent.scale.double().numpy()
            squares += ((z - z.mean(0)) ** 2).sum(0)
            count += len(z)
    std = np.sqrt(squares / count)
    assert latent_range(flow, study, spans, ALONE) == pytest.approx((std.min(), std.max()), rel=1e-5)


def test_the_latent_has_unit_deviation_and_samples_have_the_residuals_outside(study: Study, tmp_path: Path) -> None:
    spans = study.spans["train"]
    predictions = Predictions(tmp_path, study)
    predictions.write([(constant_anchor(study, 0.0), spans)], ALONE)
    flow = build_flow(study.config, shapes_of(study))
    fit_latent(flow, study, spans, predictions, ALONE)
    assert latent_range(flow, study, spans, ALONE) == pytest.approx((1.0, 1.0), abs=0.05)

    latent = flow.latent
    assert isinstance(latent, Latent)
    outside = []
    for batch in whole_runs(study.shards, spans, []):
        if batch.subject_mask[0, 0]:
            x = batch.bold[0, 0].double()
            basis = latent.basis.double()
            outside.append(x - x @ basis.T @ basis)
    wanted = torch.cat(outside).square().mean()
    noise = torch.randn(4000, latent.residual_std.shape[1], dtype=torch.float64) * latent.residual_std[0]
    projected = noise - noise @ basis.T @ basis
    assert float(projected.square().mean() / wanted) == pytest.approx(1.0, abs=0.1)
