"""Stage 2 judged as a distribution: what the files say is what the samples are, put together by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr

from tests.scoring.conftest import make_anchor, make_flow, make_study
from tests.scoring.test_full import FEW, score_fully
from tests.scoring.test_score import ALONE, make_checkpoint
from trainer.data.batches import Batch, whole_runs
from trainer.data.study import Study
from trainer.models.flow import FlowMatching
from trainer.models.randomness import make_keys
from trainer.run.directory import StageDirectory
from trainer.scoring import connectivity, proper
from trainer.scoring.baselines import ResidualModel
from trainer.scoring.distribution import CONTENDERS, Baselines, Judgement, Shown, judge_distribution
from trainer.scoring.predictor import SCORING_EPOCH, Draws, FlowPredictor, sample_keys

MEASURES = ["crps", "energy", "variogram", "coverage_50", "coverage_80", "coverage_95"]


@pytest.fixture
def few(tiny_shards: Path, debug_config: Path) -> Study:
    """Three runs, the second without the third subject; three samples."""
    study = make_study(tiny_shards, debug_config, *FEW)
    study.spans["val"] = study.spans["val"][:3]
    return study


@pytest.fixture
def predictor(few: Study) -> FlowPredictor:
    return FlowPredictor(make_anchor(few), make_flow(few), few.config, ("mean", "sample"))


def some_baselines(study: Study) -> Baselines:
    parcels = study.manifest.parcels
    model = ResidualModel(
        np.full(parcels, 0.5), np.full(parcels, 0.8), np.full((parcels, parcels), 0.5) + 0.5 * np.eye(parcels)
    )
    return Baselines([model] * 4, "somewhere")


def judge(predictor: FlowPredictor, study: Study, with_baselines: bool = True) -> Judgement:
    shown = Shown(1, np.array([[4, 0], [3, 1], [2, 2], [-1, -1]]))
    given = some_baselines(study) if with_baselines else None
    return judge_distribution(predictor, study, "val", given, shown, ALONE)


def all_draws(predictor: FlowPredictor, study: Study) -> list[list[Draws]]:
    batches = whole_runs(study.shards, study.spans["val"], study.streams, study.scaling)
    return [list(predictor.draws(batch, 3)) for batch in batches]


def test_samples_are_those_of_each_subject_alone_and_the_first_is_the_estimate(
    few: Study, predictor: FlowPredictor
) -> None:
    batch = list(whole_runs(few.shards, few.spans["val"], few.streams))[1]
    draws = list(predictor.draws(batch, 3))
    assert [each.subject for each in draws] == [0, 1, 3]
    pairs = predictor.predict(batch)
    for each in draws:
        np.testing.assert_allclose(each.samples[0], pairs["sample"][0][0, each.subject], atol=1e-5)
        np.testing.assert_allclose(each.anchor, pairs["anchor"][0][0, each.subject], atol=1e-6)
        np.testing.assert_array_equal(each.bold, batch.bold[0, each.subject])
        keys = sample_keys(make_keys(few.config.seed, SCORING_EPOCH, batch.windows, torch.tensor([each.subject])), 3)
        around = torch.from_numpy(each.anchor).float()[None]
        alone = predictor.flow.sample(around, batch.mask, torch.tensor([each.subject]), keys[2:])
        np.testing.assert_allclose(each.samples[2], alone[0], atol=1e-5)
        assert np.abs(each.samples[1] - each.samples[2]).mean() > 0.1


def test_more_samples_leave_the_first_ones_as_they_are(few: Study, predictor: FlowPredictor) -> None:
    batch = next(whole_runs(few.shards, few.spans["val"], few.streams))
    three, five = (next(predictor.draws(batch, count)).samples for count in (3, 5))
    np.testing.assert_allclose(five[:3], three, atol=1e-5)


def test_the_record_is_what_the_samples_are(few: Study, predictor: FlowPredictor) -> None:
    found = judge(predictor, few)
    runs = all_draws(predictor, few)
    of_subjects: dict[str, list[float]] = {name: [] for name in ("crps", "energy", "variogram", "coverage_80", "r")}
    for s in range(4):
        mine = [draws for run in runs for draws in run if draws.subject == s]
        assert len(mine) == (2 if s == 2 else 3)
        samples, bold = np.concatenate([d.samples for d in mine], axis=1), np.concatenate([d.bold for d in mine])
        of_subjects["crps"].append(proper.crps(samples, bold).mean())
        of_subjects["energy"].append(proper.energy_score(samples, bold).mean())
        of_subjects["variogram"].append(proper.variogram_score(samples, bold).mean())
        of_subjects["coverage_80"].append(proper.coverage(samples, bold)[1].mean())
        mean = samples.mean(axis=0)
        of_subjects["r"].append(np.mean([pearsonr(mean[:, v], bold[:, v])[0] for v in range(20)]))
    flow = found.record["flow"]
    for name in ("crps", "energy", "variogram", "coverage_80"):
        assert flow[name] == pytest.approx(np.mean(of_subjects[name])), name
    assert flow["r_mean_of_k"] == pytest.approx(np.mean(of_subjects["r"]))
    np.testing.assert_allclose(found.arrays["crps_flow"].mean(axis=1), of_subjects["crps"])
    assert list(found.record["independent"]) == [*MEASURES, "fc_r", "fc_error", "spectrum_error"]


def test_connectivity_and_spectrum_are_means_over_runs_and_subjects(few: Study, predictor: FlowPredictor) -> None:
    found = judge(predictor, few)
    draws = [each for run in all_draws(predictor, few) for each in run]
    weights = [len(each.bold) for each in draws]
    real = np.average([np.corrcoef(each.bold.T) for each in draws], axis=0, weights=weights)
    drawn = np.average(
        [np.mean([np.corrcoef(sample.T) for sample in each.samples], axis=0) for each in draws], axis=0, weights=weights
    )
    np.testing.assert_allclose(found.arrays["fc_bold"], real, atol=1e-9)
    np.testing.assert_allclose(found.arrays["fc_flow"], drawn, atol=1e-9)
    assert found.record["flow"]["fc_r"] == pytest.approx(connectivity.compare(drawn, real)[0])
    shortest = min(weights)
    power = np.average(
        [connectivity.spectrum(each.samples, shortest, few.manifest.tr) for each in draws], axis=0, weights=weights
    )
    np.testing.assert_allclose(found.arrays["spectrum_flow"], power)
    assert len(found.arrays["frequency_hz"]) == len(power) == len(found.arrays["spectrum_bold"])


def test_baselines_stand_around_the_anchor(few: Study, predictor: FlowPredictor) -> None:
    """Without scale their samples are the anchor itself."""
    given = some_baselines(few)
    nothing = replace(given.models[0], scale=np.zeros(20))  # type: ignore[type-var]
    shown = Shown(0, np.zeros((4, 2), int))
    found = judge_distribution(predictor, few, "val", replace(given, models=[nothing] * 4), shown, ALONE)
    first = [run[0] for run in all_draws(predictor, few)]
    away = [np.abs(draws.bold - draws.anchor).mean(axis=0) for draws in first]
    wanted = np.average(away, axis=0, weights=[len(draws.bold) for draws in first])
    np.testing.assert_allclose(found.arrays["crps_independent"][0], wanted)
    np.testing.assert_allclose(found.arrays["crps_full_covariance"][0], wanted)
    assert found.record["baselines_fitted_on"] == "somewhere"


def test_a_subject_whose_residuals_are_not_known_is_reported_not_hidden(few: Study, predictor: FlowPredictor) -> None:
    given = some_baselines(few)
    shown = Shown(0, np.zeros((4, 2), int))
    unknown = replace(given, models=[*given.models[:3], None])
    found = judge_distribution(predictor, few, "val", unknown, shown, ALONE)
    assert found.record["independent"]["crps"] is None
    assert found.record["flow"]["crps"] is not None


def test_without_baselines_the_flow_is_judged_alone(few: Study, predictor: FlowPredictor) -> None:
    found = judge(predictor, few, with_baselines=False)
    assert [name for name in CONTENDERS if name in found.record] == ["flow"]
    assert found.record["baselines_fitted_on"] is None
    assert found.record["flow"] == judge(predictor, few).record["flow"]


def test_samples_of_the_run_that_is_shown_are_kept(few: Study, predictor: FlowPredictor) -> None:
    samples = judge(predictor, few).samples
    run = all_draws(predictor, few)[1]
    assert samples is not None
    assert samples.shape == (3, 4, 2, 40)
    np.testing.assert_array_equal(samples[:, 0, 0], run[0].samples[:, :, 4])
    np.testing.assert_array_equal(samples[:, 1, 1], run[1].samples[:, :, 1])
    assert np.isnan(samples[:, 2]).all(), "no BOLD of that subject in that run"
    assert np.isnan(samples[:, 3]).all(), "no parcel of that subject"


class SpoiltFlow(FlowPredictor):
    """One TR of one parcel of one subject is not a number in every sample."""

    def draws(self, batch: Batch, count: int) -> Any:
        for draws in super().draws(batch, count):
            if draws.subject == 1:
                draws.samples[:, 3, 7] = np.nan
            yield draws


@pytest.mark.filterwarnings("error")
def test_what_is_not_a_number_is_reported_and_stays_where_it_is(few: Study, predictor: FlowPredictor) -> None:
    spoilt = SpoiltFlow(predictor.anchor, predictor.flow, few.config, ("mean",))
    found = judge(spoilt, few)
    assert all(value is None for value in found.record["flow"].values())
    assert all(value is not None for value in found.record["independent"].values())
    assert np.argwhere(np.isnan(found.arrays["crps_flow"])).tolist() == [[1, 7]]
    assert np.isnan(found.arrays["fc_flow"]).sum() == 39
    json.dumps(found.record, allow_nan=False)


class Silent(FlowPredictor):
    """A parcel whose BOLD is zero."""

    def draws(self, batch: Batch, count: int) -> Any:
        for draws in super().draws(batch, count):
            draws.bold[:, 7] = 0.0
            yield draws


@pytest.mark.filterwarnings("error")
def test_a_parcel_of_zeros_is_judged_like_any_other(few: Study, predictor: FlowPredictor) -> None:
    found = judge(Silent(predictor.anchor, predictor.flow, few.config, ("mean",)), few)
    assert not found.arrays["fc_bold"][7].any()
    assert all(value is not None for value in found.record["flow"].values())


def test_files_of_a_full_scoring(few: Study, tmp_path: Path) -> None:
    directory = StageDirectory(tmp_path / "run" / "stage2")
    make_checkpoint(directory, few, stage=2)
    score_fully(directory, 2, few, "val")
    begin = directory.scores / "step_00000006-val"
    record = json.loads(Path(f"{begin}-distribution.json").read_text())
    assert (record["stage"], record["step"], record["set"], record["samples"]) == (2, 6, "val", 3)
    assert "first half of each run of val" in record["baselines_fitted_on"]
    with np.load(f"{begin}-distribution.npz") as arrays:
        for name in ("bold", *CONTENDERS):
            assert arrays[f"fc_{name}"].shape == (20, 20)
            assert arrays[f"spectrum_{name}"].shape == arrays["frequency_hz"].shape
    r = np.load(f"{begin}-mean.npy")
    with np.load(f"{begin}-series.npz") as series:
        assert str(series["run"]) == "friends_s03e01a"
        assert float(series["tr_s"]) == 1.49
        assert series["samples"].shape == (3, 4, 2, 58)
        for s in range(4):
            best, median = series["parcels"][s]
            assert best == r[s].argmax()
            assert (r[s] < r[s, median]).sum() in (9, 10)
        assert np.isfinite(series["bold"]).all()
        in_run = pearsonr(series["mean"][0, 0], series["bold"][0, 0])[0]
    assert json.loads(Path(f"{begin}-mean.json").read_text())["per_run"]["friends_s03e01a"] is not None
    assert -1 <= in_run <= 1
    assert [score["estimate"] for score in directory.read_scores()] == ["mean", "sample"]


def test_no_samples_are_no_judgement(tiny_shards: Path, debug_config: Path, tmp_path: Path) -> None:
    study = make_study(tiny_shards, debug_config, "evaluate.samples=0", "evaluate.bootstrap=0")
    study.spans["val"] = study.spans["val"][:1]
    directory = StageDirectory(tmp_path / "run" / "stage2")
    make_checkpoint(directory, study, stage=2)
    score_fully(directory, 2, study, "val")
    assert not list(directory.scores.glob("*distribution*"))
    with np.load(directory.scores / "step_00000006-val-series.npz") as series:
        assert "samples" not in series


def test_more_memory_is_not_asked_for_than_one_subjects_samples(
    few: Study, predictor: FlowPredictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    honest = FlowMatching.sample

    def seen(self: FlowMatching, anchor: torch.Tensor, *given: Any, **more: Any) -> torch.Tensor:
        sizes.append(len(anchor))
        return honest(self, anchor, *given, **more)

    monkeypatch.setattr(FlowMatching, "sample", seen)
    judge(predictor, few)
    assert set(sizes) == {3}
