"""Noise ceilings and inter-subject correlations, against scipy and against data whose ceiling is known."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import pearsonr

from tests.data.conftest import write_shards
from tests.ranks import on_ranks
from tests.scoring.conftest import make_study
from tests.scoring.test_score import ALONE, Lifted, pearson
from trainer.config import load_config
from trainer.data.manifest import BOLD, Stream
from trainer.data.shards import SampleContent
from trainer.data.study import Study
from trainer.run.directory import StageDirectory
from trainer.scoring import ceilings
from trainer.scoring.ceilings import LEAST_CEILING, noise_ceiling, over_ceiling, repeats, write_ceilings


@pytest.fixture
def stage(tmp_path: Path) -> StageDirectory:
    return StageDirectory(tmp_path / "run" / "stage1")


def read_bold(study: Study, sample: int, subject: int, start: int, stop: int) -> np.ndarray:
    row = study.manifest.samples[sample].subjects.index(study.manifest.subjects[subject])
    bold = np.array(study.shards.read(sample, BOLD, start, stop, row=row))
    study.scaling.apply(bold, sample, subject)
    return bold


def by_hand(study: Study, set_name: str) -> np.ndarray:
    """rho (S, V) by scipy over the TRs that both showings have, put together."""
    keys = [sample.key for sample in study.manifest.samples]
    x: list[list[np.ndarray]] = [[] for _ in study.manifest.subjects]
    y: list[list[np.ndarray]] = [[] for _ in study.manifest.subjects]
    for span in study.spans[set_name]:
        key = study.manifest.samples[span.sample].key
        other = keys.index(key.replace("run-1", "run-2"))
        stop = min(span.stop, study.manifest.samples[other].n_trs)
        for s in range(len(study.manifest.subjects)):
            x[s].append(read_bold(study, span.sample, s, span.start, stop))
            y[s].append(read_bold(study, other, s, span.start, stop))
    return pearson(x, y)


@pytest.mark.parametrize("scaling", ["none", "run", "subject"])
def test_the_ceiling_is_that_of_both_showings_though_the_set_takes_the_first(
    tiny_shards: Path, debug_config: Path, stage: StageDirectory, scaling: str
) -> None:
    study = make_study(tiny_shards, debug_config, f"bold.standardise={scaling}")
    assert {study.manifest.samples[span.sample].repeat for span in study.spans["test"]} == {1}
    ceiling = write_ceilings(stage, study, "test", ALONE)
    wanted = np.sqrt(np.maximum(by_hand(study, "test"), 0))
    assert ceiling is not None
    np.testing.assert_allclose(ceiling, wanted, atol=1e-6)
    folder = stage.path.parent / "ceilings"
    np.testing.assert_array_equal(np.load(folder / "test.npy"), ceiling)
    content = json.loads((folder / "test.json").read_text())
    assert content["ceiling"] == pytest.approx(ceiling.mean())
    assert content["repeats"] == [[f"movie10_{film}01_run-{n}" for n in (1, 2)] for film in ("figures", "life")]
    assert content["n_below_ceiling"] == (ceiling < 0.1).sum()


def test_a_set_that_takes_both_showings_counts_each_stimulus_once(study: Study) -> None:
    first = repeats(study, "test")
    keys = [sample.key for sample in study.manifest.samples]
    second = [keys.index(f"movie10_{film}01_run-2") for film in ("life", "figures")]
    study.spans["test"] += [replace(study.spans["test"][0], sample=i, stop=20) for i in second]
    assert repeats(study, "test") == first
    study.spans["test"] = study.spans["test"][2:]
    assert [(a.sample < b.sample, len(a), len(b)) for a, b in repeats(study, "test")] == [(True, 20, 20)] * 2


def test_those_who_saw_one_showing_only_have_no_ceiling(study: Study, stage: StageDirectory) -> None:
    study.spans["test"] = [replace(span, subjects=(True, False, True, True)) for span in study.spans["test"]]
    ceiling = write_ceilings(stage, study, "test", ALONE)
    assert ceiling is not None
    assert np.isnan(ceiling).all(axis=1).tolist() == [False, True, False, False]
    content = json.loads((stage.path.parent / "ceilings" / "test.json").read_text())
    assert list(content["ceiling_per_subject"]) == [study.manifest.subjects[s] for s in (0, 2, 3)]


def test_a_set_without_repeats_has_no_ceiling_but_an_inter_subject_correlation(
    study: Study, stage: StageDirectory
) -> None:
    assert write_ceilings(stage, study, "val", ALONE) is None
    folder = stage.path.parent / "ceilings"
    assert sorted(path.name for path in folder.iterdir()) == ["val-isc.npy", "val.json"]
    content = json.loads((folder / "val.json").read_text())
    assert "ceiling" not in content
    assert content["isc"] == pytest.approx(np.load(folder / "val-isc.npy").mean())
    assert write_ceilings(stage, study, "val", ALONE) is None


def test_inter_subject_correlation_leaves_the_subject_itself_out(study: Study, stage: StageDirectory) -> None:
    study.__dict__["scaling"] = Lifted((1, 2))
    write_ceilings(stage, study, "val", ALONE)
    found = np.load(stage.path.parent / "ceilings" / "val-isc.npy")
    x: list[list[np.ndarray]] = [[] for _ in range(4)]
    y: list[list[np.ndarray]] = [[] for _ in range(4)]
    for span in study.spans["val"]:
        present = np.flatnonzero(span.subjects)
        bold = {s: read_bold(study, span.sample, s, span.start, span.stop).astype(np.float64) for s in present}
        for s in present:
            x[s].append(bold[s])
            y[s].append(np.mean([bold[other] for other in present if other != s], axis=0))
    x[1][0][0, 2] += 1.0  # scipy has no r of what is constant
    wanted = pearson(x, y)
    assert found[1, 2] == 0.0
    wanted[1, 2] = 0.0
    np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_one_person_alone_shares_nothing(study: Study, stage: StageDirectory) -> None:
    study.spans["val"] = [replace(span, subjects=(True, False, False, False)) for span in study.spans["val"]]
    write_ceilings(stage, study, "val", ALONE)
    assert [path.name for path in (stage.path.parent / "ceilings").iterdir()] == ["val.json"]


def test_ceilings_are_computed_once_for_stages_and_refits_and_again_for_other_data(
    tiny_shards: Path, debug_config: Path, study: Study, stage: StageDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = write_ceilings(stage, study, "test", ALONE)
    computed = []
    honest = ceilings.repeat_correlation
    monkeypatch.setattr(ceilings, "repeat_correlation", lambda *given: computed.append(1) or honest(*given))
    for other in (stage, stage.refit, StageDirectory(stage.path.parent / "stage2").refit):
        np.testing.assert_array_equal(write_ceilings(other, study, "test", ALONE), wanted)
    assert not computed
    (stage.path.parent / "ceilings" / "test.npy").unlink()
    np.testing.assert_array_equal(write_ceilings(stage, study, "test", ALONE), wanted)
    scaled = make_study(tiny_shards, debug_config, "bold.standardise=run")
    assert not np.array_equal(write_ceilings(stage, scaled, "test", ALONE), wanted)
    assert len(computed) == 2


def test_any_number_of_ranks_gives_the_same_bits(study: Study, tmp_path: Path) -> None:
    files = []
    for world in (1, 2, 3):
        stage = StageDirectory(tmp_path / str(world) / "stage1")
        found = on_ranks(world, lambda rank, stage=stage: write_ceilings(stage, study, "test", rank))
        assert all(np.array_equal(ceiling, found[0]) for ceiling in found)
        folder = tmp_path / str(world) / "ceilings"
        files.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert files[0] == files[1] == files[2]


def test_a_perfect_prediction_of_what_repeats_reaches_the_ceiling(tmp_path: Path, debug_config: Path) -> None:
    """Signal of variance 0.3, noise of variance 0.7: rho is 0.3, and r of the signal is the root of it."""
    rng = np.random.default_rng(3)
    signal = rng.normal(0, np.sqrt(0.3), (1, 4000, 3))
    shown = [(signal + rng.normal(0, np.sqrt(0.7), signal.shape)).astype(np.float32) for _ in range(2)]
    shown[1] = shown[1][:, :-7]  # the second showing was stopped early
    stream = Stream("x", 1, 2, "float32")
    contents = [
        SampleContent(f"s_run-{n + 1}", {}, {"bold": shown[n], "x": np.zeros((shown[n].shape[1], 2), np.float32)})
        for n in range(2)
    ]
    manifest = write_shards(tmp_path / "shards", contents, ["1"], 3, [stream])
    samples = tuple(replace(sample, run="s", repeat=n + 1) for n, sample in enumerate(manifest.samples))
    replace(manifest, samples=samples).save(tmp_path / "shards")
    sets = "datasets={train: {filter: {repeats: [2]}}, val: {filter: {repeats: [1]}}}"
    given = [f"data.shards={tmp_path / 'shards'}", "include_features=[x]", sets, "stage2.latent_dim=2"]
    study = Study(load_config(debug_config, given))
    ceiling = write_ceilings(StageDirectory(tmp_path / "run" / "stage1"), study, "val", ALONE)
    assert ceiling is not None
    reached = np.array([pearsonr(signal[0, :, v], shown[0][0, :, v])[0] for v in range(3)])
    np.testing.assert_allclose(ceiling[0], np.sqrt(0.3), atol=0.04)
    np.testing.assert_allclose(reached / ceiling[0], 1.0, atol=0.06)
    both = shown[0][:, :-7] + shown[1]
    averaged = np.array([pearsonr(signal[0, :-7, v], both[0, :, v])[0] for v in range(3)])
    np.testing.assert_allclose(averaged / noise_ceiling(ceiling[0] ** 2, n_averaged=2), 1.0, atol=0.06)


def test_the_formulas() -> None:
    rho = np.array([-1.0, -0.2, 0.0, 0.25, 1.0, np.nan])
    np.testing.assert_allclose(noise_ceiling(rho), [0, 0, 0, 0.5, 1, np.nan])
    np.testing.assert_allclose(noise_ceiling(rho, n_averaged=2), [0, 0, 0, np.sqrt(0.5 / 1.25), 1, np.nan])


def test_low_ceilings_are_left_out_and_counted() -> None:
    r = np.array([[0.1, 0.2, 0.3], [0.4, 0.4, 0.4], [np.nan] * 3, [0.5, 0.5, 0.5]])
    present = np.array([True, True, False, True])
    ceiling = np.array([[0.5, LEAST_CEILING, 0.0999], [0.0, 0.8, 0.8], [0.5] * 3, [np.nan] * 3])
    found = over_ceiling(r, ceiling, present)
    assert found is not None
    assert found.n_below == 2
    assert found.ratio == pytest.approx(np.mean([np.mean([0.2, 2.0]), 0.5]))
    assert found.mean_ceiling == pytest.approx(ceiling[:2].mean())
    assert over_ceiling(r[2:], ceiling[2:], present[2:]) is None
    spoilt = r.copy()
    spoilt[1] = np.nan  # a subject whose prediction is no number is not one without runs
    assert np.isnan(over_ceiling(spoilt, ceiling, present).ratio)  # type: ignore[union-attr]
    nothing = over_ceiling(r[:1], np.zeros((1, 3)), present[:1])
    assert nothing is not None
    assert (np.isnan(nothing.ratio), nothing.n_below) == (True, 3)
