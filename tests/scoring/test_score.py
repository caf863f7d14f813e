"""The scores of a set: r of all its TRs as scipy has it, the same to the bit on any number of ranks, nothing hidden."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr

from tests.ranks import ThreadRank, on_ranks
from tests.scoring.conftest import make_anchor, make_flow, make_study
from trainer.data.batches import Batch, whole_runs
from trainer.data.manifest import BOLD
from trainer.data.study import Study
from trainer.errors import InputError
from trainer.run import checkpoint
from trainer.run.directory import StageDirectory
from trainer.scoring.predictor import AnchorPredictor, FlowPredictor, shapes_of
from trainer.scoring.records import write_scores
from trainer.scoring.score import score_checkpoint
from trainer.scoring.sets import SetScores, score_set
from trainer.scoring.shares import OneProcess

ALONE = OneProcess(torch.device("cpu"))
OFFSET = 1e4
FACTS = {"stage": 1, "step": 5, "set": "val", "epoch": 1, "validation": True}
BOTH = ("mean", "sample")


class Lifted:
    """A scaling that lifts BOLD far above zero, and may silence a parcel."""

    def __init__(self, silent: tuple[int, int] | None = None) -> None:
        self.silent = silent

    def apply(self, bold: np.ndarray, sample: int, subject: int) -> None:
        bold += np.float32(OFFSET)
        if self.silent is not None and subject == self.silent[0]:
            bold[:, self.silent[1]] = 0.0


class Told:
    """Predicts part of the BOLD and noise that depends on the number of the run."""

    def predict(self, batch: Batch) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        bold = batch.cut(batch.scored()).bold
        return {"mean": (0.3 * (bold - OFFSET) + noise_of(int(batch.windows[0]), bold.shape) + OFFSET, bold)}


class Spoilt(Told):
    """One TR of a parcel is not a number, in one run and one subject."""

    def __init__(self, value: float) -> None:
        self.value = value

    def predict(self, batch: Batch) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        pairs = super().predict(batch)
        if batch.windows[0] == 3:
            pairs["mean"][0][0, 1, 5, 2] = self.value
        return pairs


def noise_of(run: int, shape: torch.Size) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(run))


def pearson(x: list[list[np.ndarray]], y: list[list[np.ndarray]]) -> np.ndarray:
    """r of every subject (a list of (T, V) each) and parcel, by scipy in float64; NaN without TRs."""
    parcels = next(part.shape[1] for parts in x for part in parts)
    r = np.full((len(x), parcels), np.nan)
    for s, (mine, theirs) in enumerate(zip(x, y, strict=True)):
        if mine:
            a, b = (np.concatenate(parts).astype(np.float64) for parts in (mine, theirs))
            r[s] = [pearsonr(a[:, v], b[:, v])[0] for v in range(parcels)]
    return r


def told_r(study: Study) -> np.ndarray:
    """What `Told` reaches, read and computed without anything of the scoring."""
    subjects = study.manifest.subjects
    x: list[list[np.ndarray]] = [[] for _ in subjects]
    y: list[list[np.ndarray]] = [[] for _ in subjects]
    for i, span in enumerate(study.spans["val"]):
        noise = noise_of(i, torch.Size((1, len(subjects), len(span), study.manifest.parcels)))
        present = study.manifest.samples[span.sample].subjects
        for s, label in enumerate(subjects):
            if span.subjects[s]:
                bold = study.shards.read(span.sample, BOLD, span.start, span.stop, row=present.index(label))
                lifted = torch.from_numpy(np.asarray(bold, np.float32) + np.float32(OFFSET))
                x[s].append((0.3 * (lifted - OFFSET) + noise[0, s] + OFFSET).numpy())
                y[s].append(lifted.numpy())
    return pearson(x, y)


def score_on(world: int, predictor: Any, study: Study) -> list[SetScores]:
    return on_ranks(world, lambda rank: score_set(predictor, study, "val", rank))


def assert_same_bits(found: SetScores, wanted: SetScores) -> None:
    assert list(found.correlations) == list(wanted.correlations)
    for name, correlation in wanted.correlations.items():
        np.testing.assert_array_equal(found.correlations[name].r, correlation.r)
        np.testing.assert_array_equal(found.correlations[name].n_trs, correlation.n_trs)
    assert found.flow_loss == wanted.flow_loss


def test_r_is_scipys_over_all_trs_of_each_subject(study: Study) -> None:
    study.__dict__["scaling"] = Lifted()
    found = score_set(Told(), study, "val", ALONE).correlations["mean"]
    np.testing.assert_allclose(found.r, told_r(study), rtol=0, atol=1e-10)
    trs = [sum(len(span) for span in study.spans["val"] if span.subjects[s]) for s in range(4)]
    assert found.n_trs.tolist() == trs
    assert len(set(trs)) == 4, "each subject lacks other runs"
    assert found.overall == pytest.approx(told_r(study).mean())


def test_a_subject_without_runs_is_left_out_of_the_mean(study: Study, tmp_path: Path) -> None:
    study.__dict__["scaling"] = Lifted()
    study.spans["val"] = study.spans["val"][1:2]
    scores = score_set(Told(), study, "val", ALONE)
    found, wanted = scores.correlations["mean"], told_r(study)
    assert np.isnan(wanted[2]).all()
    np.testing.assert_allclose(found.r, wanted, rtol=0, atol=1e-10)
    assert found.overall == pytest.approx(np.nanmean(wanted))
    written = write_scores(StageDirectory(tmp_path), scores, study.manifest.subjects, FACTS)["mean"]
    assert list(written["per_subject"]) == [study.manifest.subjects[s] for s in (0, 1, 3)]


@pytest.mark.parametrize("runs", [slice(0, 7), slice(0, 1)], ids=["seven runs", "one run"])
def test_any_number_of_ranks_gives_the_same_bits(study: Study, runs: slice) -> None:
    study.spans["val"] = [replace(span, stop=span.start + 16) for span in study.spans["val"][runs]]
    predictor = FlowPredictor(make_anchor(study), make_flow(study), study.config, BOTH)
    wanted = score_set(predictor, study, "val", ALONE)
    names = ["anchor", "anchor_subspace", "mean", "mean_subspace", "sample", "sample_subspace"]
    assert sorted(wanted.correlations) == names
    assert all(np.isfinite(wanted.correlations[name].r).all() for name in names)
    for world in (2, 3, 8):
        for found in score_on(world, predictor, study):
            assert_same_bits(found, wanted)


def test_every_rank_hears_of_a_shard_that_one_cannot_read(study: Study) -> None:
    class Torn(Told):
        def predict(self, batch: Batch) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
            if batch.windows[0] == 4:
                raise InputError("shard-00004.tar", "damaged")
            return super().predict(batch)

    def work(rank: ThreadRank) -> str:
        with pytest.raises(InputError) as raised:
            score_set(Torn(), study, "val", rank)
        return str(raised.value)

    assert on_ranks(3, work) == ["shard-00004.tar: damaged"] * 3


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("silent", [None, (1, 2)])
@pytest.mark.filterwarnings("ignore:invalid value")
def test_what_is_not_a_number_is_reported(
    study: Study, tmp_path: Path, value: float, silent: tuple[int, int] | None
) -> None:
    study.__dict__["scaling"] = Lifted(silent)
    for found in (score_set(Spoilt(value), study, "val", ALONE), score_on(2, Spoilt(value), study)[1]):
        correlation = found.correlations["mean"]
        assert np.argwhere(~np.isfinite(correlation.r)).tolist() == [[1, 2]]
        assert correlation.n_constant == 0
        directory = StageDirectory(tmp_path)
        write_scores(directory, found, study.manifest.subjects, FACTS)
        (path,) = directory.scores.glob("*.json")
        score = json.loads(path.read_text())
        assert score["pearson_r"] is None
        assert [r is None for r in score["per_subject"].values()] == [False, True, False, False]
        assert checkpoint.quality(score) is None


def test_a_parcel_of_zeros_has_r_0_and_is_counted(study: Study) -> None:
    wanted = score_on_lifted(study, None)
    found = score_on_lifted(study, (1, 2))
    assert found.n_constant == 1
    assert found.r[1, 2] == 0.0
    others = np.ones_like(found.r, dtype=bool)
    others[1, 2] = False
    np.testing.assert_array_equal(found.r[others], wanted.r[others])
    assert found.overall == pytest.approx(found.r.mean())


def score_on_lifted(study: Study, silent: tuple[int, int] | None) -> Any:
    study.__dict__["scaling"] = Lifted(silent)
    return score_set(Told(), study, "val", ALONE).correlations["mean"]


@pytest.mark.parametrize("context", [2, 5])
def test_runs_that_are_cut_are_scored_with_the_features_around_them(
    tiny_shards: Path, debug_config: Path, context: int
) -> None:
    study = make_study(tiny_shards, debug_config, f"data.context_trs={context}")
    anchor = make_anchor(study)
    x: list[list[np.ndarray]] = [[] for _ in study.manifest.subjects]
    y: list[list[np.ndarray]] = [[] for _ in study.manifest.subjects]
    for span in study.spans["val"]:
        n_trs = study.manifest.samples[span.sample].n_trs
        whole = type(span)(span.sample, 0, n_trs, span.subjects)
        (batch,) = whole_runs(study.shards, [whole], study.streams)
        with torch.no_grad():
            mu = anchor(batch.features, batch.mask)
        for s in np.flatnonzero(span.subjects):
            x[s].append(mu[0, s, span.start : span.stop].numpy())
            y[s].append(batch.bold[0, s, span.start : span.stop].numpy())
    wanted = pearson(x, y)
    for found in (
        score_set(AnchorPredictor(anchor), study, "val", ALONE),
        *score_on(3, AnchorPredictor(anchor), study),
    ):
        np.testing.assert_allclose(found.correlations["mean"].r, wanted, rtol=0, atol=1e-5)
    bare = make_study(tiny_shards, debug_config)
    without = score_set(AnchorPredictor(anchor), bare, "val", ALONE).correlations["mean"].r
    assert np.abs(without - wanted).max() > 1e-4


def test_a_trained_projection_has_no_flow_loss(tiny_shards: Path, debug_config: Path) -> None:
    study = make_study(tiny_shards, debug_config, "stage2.projection=linear")
    predictor = FlowPredictor(make_anchor(study), make_flow(study), study.config, ("mean",))
    assert score_set(predictor, study, "val", ALONE).flow_loss is None


def make_checkpoint(directory: StageDirectory, study: Study, *, stage: int) -> None:
    """Step 6 of a stage; stage 2 stands around an anchor."""
    facts = {"shapes": shapes_of(study).as_json(), "steps_per_epoch": 3}
    anchor = checkpoint.Checkpoint(make_anchor(study).state_dict(), {}, facts)
    if stage == 1:
        checkpoint.save(directory.checkpoints, 6, anchor)
        return
    checkpoint.save(directory.checkpoints, 6, checkpoint.Checkpoint(make_flow(study).state_dict(), {}, facts))
    checkpoint.save(directory.path / "stage_1", 6, anchor)
    checkpoint.copy_weights(checkpoint.folder_of(directory.path / "stage_1", 6), directory.anchor)


def test_the_main_process_writes_and_says_what_all_ranks_score(study: Study, tmp_path: Path) -> None:
    one, three = StageDirectory(tmp_path / "one"), StageDirectory(tmp_path / "three")
    make_checkpoint(one, study, stage=2)
    shutil.copytree(one.path, three.path)
    heard: list[str] = []
    score_checkpoint(one, 2, 6, study, ["val", "test"], ALONE, heard.append, full=False)

    def work(rank: ThreadRank) -> list[str]:
        said: list[str] = []
        score_checkpoint(three, 2, 6, study, ["val", "test"], rank, said.append, full=False)
        assert len(list(three.scores.glob("*-test-*.json"))) == 2, "written before any rank goes on"
        return said

    said = on_ranks(3, work)
    assert [line.replace("three", "one") for line in said[0]] == heard
    assert said[1:] == [[], []]
    written = {path.name: path.read_bytes() for path in one.scores.iterdir()}
    assert {path.name: path.read_bytes() for path in three.scores.iterdir()} == written
    assert sorted(name for name in written if name.endswith(".json")) == [
        f"step_00000006-{name}-{estimate}.json" for name in ("test", "val") for estimate in BOTH
    ]
    score = json.loads(written["step_00000006-val-mean.json"])
    assert (score["epoch"], score["step"], score["set"], score["validation"]) == (2, 6, "val", False)


def test_a_step_that_validated_the_training_does_so_still_after_it_is_scored_again(
    study: Study, tmp_path: Path
) -> None:
    directory = StageDirectory(tmp_path)
    make_checkpoint(directory, study, stage=1)
    score_checkpoint(directory, 1, 6, study, ["val"], ALONE, lambda _: None, full=False)
    assert checkpoint.best_step(directory.read_scores(), "val") is None
    scores = score_set(Told(), study, "val", ALONE)
    write_scores(directory, scores, study.manifest.subjects, {**FACTS, "step": 6})
    score_checkpoint(directory, 1, 6, study, ["val"], ALONE, lambda _: None, full=False)
    assert checkpoint.best_step(directory.read_scores(), "val") == 6
