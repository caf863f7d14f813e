"""Sets as they come: runs of one TR, constant parcels, a subject without BOLD, more parcels than have pairs judged."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.scoring.conftest import make_study
from tests.scoring.test_full import FEW, files_of, score_fully
from tests.scoring.test_score import Lifted, make_checkpoint
from trainer.data.plan import Span
from trainer.data.study import Study
from trainer.run.directory import StageDirectory
from trainer.scoring.baselines import ResidualModel, fit
from trainer.scoring.connectivity import correlations
from trainer.scoring.proper import spread_evenly

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture
def few(tiny_shards: Path, debug_config: Path) -> Study:
    study = make_study(tiny_shards, debug_config, *FEW)
    study.spans["val"] = study.spans["val"][:3]
    return study


def scored(
    study: Study, folder: Path, spans: list[Span] | None = None
) -> tuple[dict[str, Any], dict[str, Any], dict[str, np.ndarray]]:
    """The mean's score, what is said of the distribution, and its arrays; of other spans than the latent is of."""
    directory = StageDirectory(folder / "run" / "stage2")
    make_checkpoint(directory, study, stage=2)
    if spans is not None:
        study.spans["val"] = spans
    score_fully(directory, 2, study, "val")
    begin = directory.scores / "step_00000006-val"
    with np.load(f"{begin}-distribution.npz") as arrays:
        found = {name: arrays[name] for name in arrays.files}
    return *(json.loads(Path(f"{begin}-{kind}.json").read_text()) for kind in ("mean", "distribution")), found


def short(span: Span, n_trs: int) -> Span:
    return replace(span, stop=span.start + n_trs)


def test_runs_of_one_tr_have_no_part_in_what_they_cannot_tell(few: Study, tmp_path: Path) -> None:
    whole = list(few.spans["val"])
    alone, alone_judged, alone_arrays = scored(few, tmp_path / "alone")
    # behind the others, so that these have the same noise
    score, judged, arrays = scored(few, tmp_path / "more", [*whole, short(whole[0], 1)])
    assert score["rsa"] == alone["rsa"] and score["rsa"]["all"] is not None
    assert judged["segment_trs"] == alone_judged["segment_trs"]
    for name in ("fc_bold", "fc_flow", "spectrum_bold", "spectrum_flow"):
        np.testing.assert_array_equal(arrays[name], alone_arrays[name])
    assert judged["flow"]["crps"] != alone_judged["flow"]["crps"]


@pytest.mark.parametrize("lengths", [(1,), (1, 1, 1), (2, 1, 2)])
def test_sets_of_nothing_but_short_runs_are_scored(few: Study, tmp_path: Path, lengths: tuple[int, ...]) -> None:
    spans = [short(span, n) for span, n in zip(few.spans["val"], lengths, strict=False)]
    score, judged, _ = scored(few, tmp_path, spans)
    assert score["pearson_r"] is not None and score["rsa"]["all"] is None and "ci" not in score
    known = max(lengths) > 1
    assert (judged["flow"]["fc_error"] is not None) == (judged["flow"]["spectrum_error"] is not None) == known
    assert judged["flow"]["crps"] is not None


def test_a_subject_without_any_bold_and_a_constant_parcel_are_scored_around(few: Study, tmp_path: Path) -> None:
    few.spans["val"] = [replace(span, subjects=(False, True, False, True)) for span in few.spans["val"]]
    few.__dict__["scaling"] = Lifted((1, 2))
    score, judged, arrays = scored(few, tmp_path)
    assert list(score["per_subject"]) == [few.manifest.subjects[s] for s in (1, 3)]
    assert all(value is not None for value in judged["flow"].values())
    assert np.isnan(arrays["crps_flow"]).all(axis=1).tolist() == [True, False, True, False]


def test_pairs_are_judged_of_as_many_parcels_as_asked(
    few: Study, tiny_shards: Path, debug_config: Path, tmp_path: Path
) -> None:
    whole, whole_judged, whole_arrays = scored(few, tmp_path / "whole")
    for most, folder in ((20, "all"), (7, "some")):
        study = make_study(tiny_shards, debug_config, *FEW, f"evaluate.parcels={most}")
        study.spans["val"] = study.spans["val"][:3]
        score, judged, arrays = scored(study, tmp_path / folder)
    same = (files_of(tmp_path / name / "run" / "stage2" / "scores") for name in ("whole", "all"))
    assert next(same) == next(same)
    assert judged["pairs_of_parcels"] == score["pairs_of_parcels"] == {"taken": 7, "of": 20}
    assert "pairs_of_parcels" not in whole
    parcels = arrays["fc_parcels"]
    assert parcels.tolist() == spread_evenly(20, 7).tolist()
    for name in ("fc_bold", "fc_flow", "fc_independent"):
        np.testing.assert_allclose(arrays[name], whole_arrays[name][np.ix_(parcels, parcels)], atol=1e-12)
    for name in ("crps", "energy", "variogram", "coverage_80"):
        assert judged["flow"][name] == whole_judged["flow"][name]
    assert score["pearson_r"] == whole["pearson_r"]


def test_parcels_whose_pairs_are_not_fitted_are_independent() -> None:
    rng = np.random.default_rng(0)
    mixed = rng.normal(size=(400, 3)) @ rng.normal(size=(3, 9)) + 0.3 * rng.normal(size=(400, 9))
    every, some = fit(lambda: [mixed]), fit(lambda: [mixed], 4)
    assert every is not None and some is not None and some.parcels is not None
    np.testing.assert_array_equal(some.phi, every.phi)
    assert some.correlation.shape == (4, 4)

    def drawn(model: ResidualModel, *, full: bool) -> np.ndarray:
        return model.draw(2, 3000, np.random.default_rng(1), full=full)

    full, independent = drawn(some, full=True), drawn(some, full=False)
    others = np.setdiff1d(np.arange(9), some.parcels)
    np.testing.assert_array_equal(full[:, :, others], independent[:, :, others])
    found = correlations(full[0])
    wanted = correlations(drawn(every, full=True)[0])
    inside = np.ix_(some.parcels, some.parcels)
    np.testing.assert_allclose(found[inside], wanted[inside], atol=0.15)
    assert np.abs(found[np.ix_(others, some.parcels)]).max() < 0.15 < np.abs(wanted[np.ix_(others, some.parcels)]).max()
