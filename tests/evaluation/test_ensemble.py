"""The average of the best checkpoints: chosen on one set, scored on another, against float64 by hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.test_cli import refused
from trainer.cli import main
from trainer.data.plan import Span
from trainer.evaluation.ensemble import choose, z_scored
from trainer.run import checkpoint

TRAIN = ["stage1.max_steps=8", "tracker=none", "checkpoint.keep_last=9"]


@pytest.fixture(scope="module")
def runs(debug_config: Path, tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two short trainings of stage 1 with other seeds, all checkpoints scored on val and test; not to be changed."""
    folder = tmp_path_factory.mktemp("ensemble")
    for seed in (1, 2):
        train = ["train", "--config", str(debug_config), "--stage", "1", "--run", str(folder / str(seed)), *TRAIN]
        assert main([*train, f"data.shards={tiny_shards}", f"seed={seed}", "checkpoint.every_steps=4"]) == 0
        assert main(["evaluate", str(folder / str(seed)), "--step", "all", "--set", "val", "test"]) == 0
    return [folder / "1", folder / "2"]


@pytest.fixture
def copies(runs: list[Path], tmp_path: Path) -> list[Path]:
    """The same, to be written into."""
    return [Path(shutil.copytree(run, tmp_path / run.name)) for run in runs]


def run_ensemble(runs: list[Path], *options: str) -> int:
    return main(["ensemble", *map(str, runs), *options])


def arrays(run: Path, set_name: str) -> dict[int, np.ndarray]:
    """Step -> r (S, V) of the score files."""
    steps = checkpoint.steps(run / "stage1" / "checkpoints")
    return {s: np.load(run / "stage1" / "scores" / f"step_{s:08d}-{set_name}-mean.npy") for s in steps}


def predictions(run: Path, step: int) -> list[np.ndarray]:
    """(S, T, V) of each run of the test set, by the run's own anchor."""
    from trainer.config import load_config
    from trainer.data.batches import whole_runs
    from trainer.data.study import Study
    from trainer.run.directory import RunDirectory
    from trainer.scoring.predictor import load_predictor

    study = Study(load_config(run / "stage1" / "config.yaml"))
    predictor = load_predictor(RunDirectory(run).stage(1), 1, step, study, torch.device("cpu"))
    batches = whole_runs(study.shards, study.spans["test"], study.streams)
    return [predictor.predict(batch)["mean"][0][0].double().numpy() for batch in batches]


def test_the_score_is_that_of_the_average_by_hand(
    copies: list[Path], tiny_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_ensemble(copies, "--set", "test", "--choose-on", "val", "--best", "2") == 0
    printed = capsys.readouterr().out
    candidates = [(run, step, r) for run in copies for step, r in sorted(arrays(run, "val").items())]
    assert len(candidates) >= 4
    predicted = [np.concatenate(predictions(run, step), axis=1) for run, step, _ in candidates]
    from trainer.data.shards import Shards

    shards = Shards(tiny_shards)
    tests = [i for i, s in enumerate(shards.manifest.samples) if s.film in ("figures", "life") and s.repeat == 1]
    bold = np.concatenate([shards.read(i, "bold", 0, shards.manifest.samples[i].n_trs) for i in tests], 1)
    expected = np.zeros(bold.shape[::2])
    for s, v in np.ndindex(*expected.shape):
        best = sorted(range(len(candidates)), key=lambda i: -candidates[i][2][s, v])[:2]
        series = [predicted[i][s, :, v] for i in best]
        average = sum((x - x.mean()) / x.std() for x in series)
        expected[s, v] = np.corrcoef(average, bold[s, :, v])[0, 1]
    found = np.load(copies[0] / "ensemble" / "test.npy")
    np.testing.assert_allclose(found, expected, atol=1e-5)
    content = json.loads((copies[0] / "ensemble" / "test.json").read_text())
    assert content["pearson_r"] == pytest.approx(expected.mean(), abs=1e-5)
    assert (content["set"], content["choose_on"], content["best"]) == ("test", "val", 2)
    assert content["n_candidates"] == len(candidates)
    assert sum(member["share"] for member in content["members"]) == pytest.approx(2)
    for member in content["members"]:
        stored = Path(member["checkpoint"]) / "scores" / f"step_{member['step']:08d}-test-mean.json"
        assert member["pearson_r"] == pytest.approx(json.loads(stored.read_text())["pearson_r"], abs=1e-12)
    assert f"test Overall Pearson's r: {content['pearson_r']:.4f}" in printed and "Sub 5 Mean" in printed
    assert not (copies[1] / "ensemble").exists()


def test_one_checkpoint_alone_has_its_own_score(copies: list[Path]) -> None:
    """z-scoring changes no r."""
    assert run_ensemble(copies[:1], "--set", "test", "--choose-on", "val", "--best", "1") == 0
    r = arrays(copies[0], "val")
    order = np.argmax(np.stack(list(r.values())), 0)
    own = np.stack(list(arrays(copies[0], "test").values()))
    expected = np.take_along_axis(own, order[None], 0)[0]
    np.testing.assert_allclose(np.load(copies[0] / "ensemble" / "test.npy"), expected, atol=1e-6)


def test_checkpoints_that_are_gone_are_not_candidates(copies: list[Path]) -> None:
    steps = checkpoint.steps(copies[0] / "stage1" / "checkpoints")
    shutil.rmtree(checkpoint.folder_of(copies[0] / "stage1" / "checkpoints", steps[0]))
    assert run_ensemble(copies[:1], "--set", "test", "--choose-on", "val") == 0
    content = json.loads((copies[0] / "ensemble" / "test.json").read_text())
    assert content["n_candidates"] == len(steps) - 1
    assert {member["step"] for member in content["members"]} == set(steps[1:])


@pytest.mark.slow
def test_both_stages_take_part(debug_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(debug_run, tmp_path / "run"))
    assert run_ensemble([run], "--set", "test", "--choose-on", "val", "--best", "9") == 0
    members = json.loads((run / "ensemble" / "test.json").read_text())["members"]
    assert {member["stage"] for member in members} == {1, 2}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--set", "val", "--choose-on", "val"], "--choose-on: the set that is scored: found val"),
        (["--set", "train", "--choose-on", "val"], "datasets.train: shares TRs"),
        (["--set", "tset", "--choose-on", "val"], "--set: no such set in the run: found tset"),
        (["--set", "test", "--choose-on", "vla"], "--choose-on: no such set in the run: found vla"),
        (["--set", "val", "--choose-on", "train"], "is scored there: found train. Score them first"),
        (["--set", "test", "--choose-on", "val", "--best", "0"], "--best: found 0"),
    ],
)
def test_sets_that_would_not_judge_fairly_are_refused(
    runs: list[Path], capsys: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    assert words in refused(capsys, "ensemble", *map(str, runs), *options)
    assert not any((run / "ensemble").exists() for run in runs)


def edit_config(run: Path, *changes: tuple[str, str]) -> None:
    path = run / "stage1" / "config.yaml"
    text = path.read_text()
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new, 1)
    path.write_text(text)


def test_sets_of_other_names_that_share_trs_are_refused(copies: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    add = ("datasets:\n", "datasets:\n  again: {filter: {runs: [s06e01a]}}\n  old: {filter: {seasons: [1]}}\n")
    for run in copies:
        edit_config(run, add)
    message = refused(capsys, "ensemble", *map(str, copies), "--set", "again", "--choose-on", "val")
    assert "datasets.again: shares TRs of friends_s06e01a with val" in message
    message = refused(capsys, "ensemble", *map(str, copies), "--set", "old", "--choose-on", "val")
    assert "datasets.old: shares TRs of friends_s01e01a with what" in message and "was trained on" in message


def test_runs_that_differ_are_refused(copies: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["ensemble", *map(str, copies), "--set", "test", "--choose-on", "val"]
    edit_config(copies[1], ("standardise: none", "standardise: run"))
    assert "bold.standardise differ(s): found run, expected none" in refused(capsys, *arguments)
    edit_config(copies[1], ("standardise: run", "standardise: none"), ("- life", "- chaplin"))
    message = refused(capsys, *arguments)
    assert "datasets.test differ(s)" in message and str(copies[1]) in message


def test_a_refit_is_refused_on_the_validation_set_that_it_has_learnt_from(
    copies: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    stage = copies[0] / "stage1"
    arguments = ["ensemble", str(copies[0]), "--set", "val", "--choose-on", "test"]
    assert main(arguments) == 0, "chosen on the test set, the others may be scored there"
    shutil.copytree(stage / "checkpoints", stage / "refit" / "checkpoints")
    shutil.copytree(stage / "scores", stage / "refit" / "scores")
    message = refused(capsys, *arguments)
    assert "datasets.val: shares TRs of friends_s06e01a with what" in message and "stage1/refit" in message


def test_score_arrays_that_do_not_fit_are_named(copies: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["ensemble", str(copies[0]), "--set", "test", "--choose-on", "val"]
    path = sorted((copies[0] / "stage1" / "scores").glob("*-val-mean.npy"))[0]
    np.save(path, np.zeros((4, 21)))
    assert f"{path}: shape: found (4, 21), expected (4, 20)" in refused(capsys, *arguments)
    path.write_bytes(b"torn")
    assert f"{path}: cannot be read" in refused(capsys, *arguments)
    assert "holds no training" in refused(capsys, "ensemble", str(copies[0] / "no"), *arguments[2:])


r_values = st.floats(-1, 1) | st.just(float("nan"))


@given(st.integers(1, 5), st.integers(1, 3), st.integers(1, 4), st.integers(1, 6), st.data())
def test_the_chosen_are_the_best(m: int, s: int, v: int, best: int, data: st.DataObject) -> None:
    r = np.array(data.draw(st.lists(r_values, min_size=m * s * v, max_size=m * s * v))).reshape(m, s, v)
    chosen = choose(r, best)
    assert (chosen.sum(0) == min(best, m)).all()
    for i, j in np.ndindex(s, v):
        if np.isnan(r[:, i]).all():
            continue
        rated = [-np.inf if np.isnan(x) else x for x in r[:, i, j]]
        expected = sorted(range(m), key=lambda k: (-rated[k], k))[:best]
        assert np.flatnonzero(chosen[:, i, j]).tolist() == sorted(expected)


def test_a_subject_without_r_takes_what_is_best_for_the_others() -> None:
    r = np.array([[[0.1, 0.5], [np.nan] * 2, [0.2, 0.0]], [[0.3, 0.1], [np.nan] * 2, [0.1, 0.2]]])
    assert choose(r, 1)[:, 1].tolist() == [[False, True], [True, False]]


def test_z_scores_are_those_of_all_trs_of_which_there_is_bold() -> None:
    rng = np.random.default_rng(0)
    spans = [Span(0, 0, 5, (True, True)), Span(1, 0, 7, (True, False)), Span(2, 0, 4, (True, True))]
    runs = [(rng.normal(1e4, 3, (2, len(span), 3))).astype(np.float32) for span in spans]
    runs[1][1] = np.nan  # nothing is predicted for who is absent
    for run in runs:
        run[0, :, 2] = 5
    found = z_scored([np.nan_to_num(run) for run in runs], spans)
    for subject, used in ((0, [0, 1, 2]), (1, [0, 2])):
        x = np.concatenate([runs[i][subject] for i in used]).astype(np.float64)
        std = x.std(0)
        expected = np.where(std > 1e-6, (x - x.mean(0)) / np.where(std > 1e-6, std, 1), 0)
        np.testing.assert_allclose(np.concatenate([found[i][subject] for i in used]), expected, atol=1e-5)
