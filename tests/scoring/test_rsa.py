"""Representational similarity against scipy, and the networks of an atlas."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import pdist
from scipy.stats import rankdata, spearmanr

from tests.scoring.conftest import make_study
from tests.scoring.test_full import FEW, score_fully
from tests.scoring.test_score import ALONE, Told, make_checkpoint
from trainer.data.study import Study
from trainer.errors import InputError
from trainer.run.directory import StageDirectory
from trainer.scoring import full, rsa
from trainer.scoring.atlas import networks
from trainer.scoring.sets import Details, score_set


def patterns(n: int, parcels: int, offset: float = 1e4, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, parcels)) + offset * rng.normal(size=parcels)


def by_scipy(prediction: np.ndarray, bold: np.ndarray) -> float:
    a, b = (pdist(x - x.mean(axis=0), "correlation") for x in (prediction.astype(float), bold.astype(float)))
    return float(spearmanr(a, b)[0])


def test_similarity_is_scipys() -> None:
    bold = patterns(30, 7)
    prediction = 0.5 * bold + patterns(30, 7, seed=1)
    present = np.array([True, False])
    groups = {"all": np.arange(7), "some": np.array([1, 2, 5]), "one": np.array([3])}
    found = rsa.similarities(np.stack([prediction, bold]), np.stack([bold, bold]), present, groups)
    assert found[0, 0] == pytest.approx(by_scipy(prediction, bold))
    assert found[0, 1] == pytest.approx(by_scipy(prediction[:, [1, 2, 5]], bold[:, [1, 2, 5]]))
    assert np.isnan(found[0, 2])
    assert np.isnan(found[1]).all()
    assert rsa.similarities(bold[None], bold[None], present[:1], groups)[0, 0] == pytest.approx(1.0)
    assert np.isnan(rsa.similarities(bold[None, :2], bold[None, :2], present[:1], groups)).all()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=20))
def test_ranks_are_scipys_with_ties(values: list[int]) -> None:
    np.testing.assert_array_equal(rsa.ranks(np.array(values, float)), rankdata(values))


@pytest.mark.filterwarnings("error")
def test_what_does_not_vary_is_like_nothing_and_what_is_no_number_shows() -> None:
    bold = patterns(12, 5)
    groups = {"all": np.arange(5)}
    here = np.ones(1, bool)
    with_zeros = bold.copy()
    with_zeros[:, 2] = 0.0
    found = rsa.similarities(bold[None], with_zeros[None], here, groups)[0, 0]
    assert found == pytest.approx(by_scipy(bold, with_zeros))
    flat = np.broadcast_to(bold[:1].astype(np.float32), bold.shape)
    assert rsa.similarities(flat[None], bold[None], here, groups)[0, 0] == 0.0
    spoilt = bold.copy()
    spoilt[3, 3] = np.nan
    assert np.isnan(rsa.similarities(spoilt[None], bold[None], here, groups)[0, 0])


def test_runs_are_averaged_for_those_who_saw_them() -> None:
    runs = [np.array([[0.2], [np.nan]]), np.array([[0.4], [0.6]])]
    present = [np.array([True, False]), np.array([True, True])]
    similarity = rsa.over_runs(runs, present)
    np.testing.assert_allclose(similarity[:, 0], [0.3, 0.6])
    assert rsa.summary(similarity, np.ones(2, bool), {"all": np.arange(3)}) == {"all": pytest.approx(0.45)}
    lacking = rsa.over_runs(runs[:1], present[:1])
    assert np.isnan(lacking[1, 0])
    spoilt = rsa.over_runs([np.array([[np.nan], [0.1]]), runs[1]], [np.ones(2, bool)] * 2)
    assert np.isnan(spoilt[0, 0])


def test_long_runs_and_many_runs_are_thinned() -> None:
    assert len(rsa.trs_of_a_run(40, 1)) == 40
    assert len(rsa.trs_of_a_run(900, 1)) == 300
    assert len(rsa.trs_of_a_run(900, 48)) == 62


def test_a_score_file_holds_the_similarity_of_each_network(
    tiny_shards: Path, debug_config: Path, tmp_path: Path
) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text("".join(f"{i + 1} 7Networks_LH_{'Vis' if i < 12 else 'Cont'}_{i} 1 2 3 0\n" for i in range(20)))
    study = make_study(tiny_shards, debug_config, *FEW, f"evaluate.labels={labels}")
    directory = StageDirectory(tmp_path / "run" / "stage1")
    make_checkpoint(directory, study, stage=1)
    said = score_fully(directory, 1, study, "val")
    score = json.loads((directory.scores / "step_00000006-val-mean.json").read_text())
    assert list(score["rsa"]) == ["all", "Vis", "Cont"]
    assert score["rsa_by"] == "TRs within runs"
    assert any("representational similarity" in text for text in said)

    everything = Details(frozenset(range(7)), rsa.groups_of(study))
    scores = score_set(Told(), study, "val", ALONE, everything)
    of_subjects = np.full((7, 4), np.nan)
    for i, run in enumerate(scores.runs):
        series = run.series["mean"]
        for s in np.flatnonzero(series.present):
            of_subjects[i, s] = by_scipy(series.prediction[s][:, :12], series.bold[s][:, :12])
    found = full.similarity_keys(scores, "mean", rsa.groups_of(study), ALONE)["rsa"]
    assert found["Vis"] == pytest.approx(np.nanmean(of_subjects, axis=0).mean(), abs=1e-9)


def test_ten_runs_are_compared_with_each_other(study: Study) -> None:
    study.spans["val"] += [replace(span, start=1, stop=12) for span in study.spans["test"] + study.spans["val"][:2]]
    assert len(study.spans["val"]) == 11
    assert rsa.compares_runs(study, 10)
    assert not rsa.compares_runs(study, 9)
    scores = score_set(Told(), study, "val", ALONE)
    similarity = full.similarity_keys(scores, "mean", rsa.groups_of(study), ALONE)
    assert similarity["rsa_by"] == "runs"
    sums = [run.pairs["mean"] for run in scores.runs]
    wanted = []
    for s in range(4):
        there = [run for run in sums if run.n[s]]
        wanted.append(by_scipy(*(np.stack([getattr(run, f)[s] for run in there]) for f in ("mean_x", "mean_y"))))
    assert similarity["rsa"]["all"] == pytest.approx(np.mean(wanted))


def test_runs_that_are_z_scored_have_no_pattern_of_their_own(tiny_shards: Path, debug_config: Path) -> None:
    assert not rsa.compares_runs(make_study(tiny_shards, debug_config, "bold.standardise=run"), 10)


def test_networks_are_read_from_schaefers_file_and_from_plain_names(tmp_path: Path) -> None:
    path = tmp_path / "labels.txt"
    path.write_text(
        "1 7Networks_LH_Vis_1 120 18 131 0\n2\t7Networks_RH_Default_PFC_2\t205 62 78 0\n"
        "3 17Networks_LH_VisCent_ExStr_1 0 0 0 0\n\n"
    )
    assert networks(path, 3) == ["Vis", "Default", "VisCent"]
    path.write_text("Vis\n7Networks_LH_Limbic_OFC_3\nleft motor\n")
    assert networks(path, 3) == ["Vis", "Limbic", "left motor"]


def test_labels_of_parcels_that_are_left_out_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "labels.txt"
    path.write_text("Vis\nSomMot\nDefault\nLimbic\n")
    assert networks(path, 2, dropped=(0, 2)) == ["SomMot", "Limbic"]
    with pytest.raises(InputError, match="found 4 lines, expected 3, one for each parcel and for the 1 left out"):
        networks(path, 2, dropped=(1,))


def test_a_label_file_that_does_not_fit_is_refused(tmp_path: Path, tiny_shards: Path, debug_config: Path) -> None:
    path = tmp_path / "labels.txt"
    path.write_text("Vis\nVis\n")
    with pytest.raises(InputError, match=r"labels\.txt.*2 lines.*20, one for each parcel"):
        rsa.groups_of(make_study(tiny_shards, debug_config, f"evaluate.labels={path}"))
    with pytest.raises(InputError, match=r"gone\.txt.*evaluate\.labels"):
        networks(tmp_path / "gone.txt", 2)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="cannot be read"):
        networks(path, 1)
