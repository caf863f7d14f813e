"""Predictions of a trained run: those that scoring sees, for whoever has BOLD and for whoever has none."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest

from tests.test_cli import refused
from trainer.cli import main
from trainer.config import load_config
from trainer.data.shards import Shards
from trainer.data.study import Study
from trainer.data.targets import unpickled_npy
from trainer.errors import InputError
from trainer.predict import Request, predict
from trainer.run.directory import RunDirectory
from trainer.submission import Wanted, check_submission, wanted_predictions

S7 = "datasets.s7.filter.seasons=[7]"
OOD = "datasets.ood.filter.series=[ood]"


def read(path: Path) -> dict[str, dict[str, np.ndarray]]:
    """Subject -> sample -> prediction."""
    with h5py.File(path) as file:
        return {label: {key: group[key][:] for key in group} for label, group in file.items()}


def bold_of(shards: Shards, label: str, predictions: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(TRs, V) of what is predicted and of what was measured, over the runs that the subject has BOLD of."""
    x, y = [], []
    for i, sample in enumerate(shards.manifest.samples):
        if sample.key in predictions and label in sample.subjects:
            x.append(predictions[sample.key])
            y.append(shards.read(i, "bold", 0, sample.n_trs, row=sample.subjects.index(label)))
    return np.concatenate(x), np.concatenate(y)


def pearson(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = x.astype(np.float64) - x.mean(0, np.float64), y.astype(np.float64) - y.mean(0, np.float64)
    r: np.ndarray = (x * y).sum(0) / np.sqrt((x**2).sum(0) * (y**2).sum(0))
    return r


@pytest.mark.parametrize(("stage", "estimate"), [(1, "mean"), (2, "mean"), (2, "sample")])
def test_r_of_what_is_written_is_that_of_the_score_file(
    debug_run: Path, tiny_shards: Path, tmp_path: Path, stage: int, estimate: str
) -> None:
    out = tmp_path / "deeper" / "p.h5"
    options = ["--stage", str(stage), "--estimate", estimate]
    assert main(["predict", str(debug_run), "--set", "test", "--out", str(out), *options]) == 0
    step = json.loads((debug_run / f"stage{stage}" / "finished.json").read_text())["step"]
    stored = np.load(debug_run / f"stage{stage}" / "scores" / f"step_{step:08d}-test-{estimate}.npy")
    shards = Shards(tiny_shards)
    for s, (label, predictions) in enumerate(read(out).items()):
        drawn = {key: values[0] if estimate == "sample" else values for key, values in predictions.items()}
        found = pearson(*bold_of(shards, label, drawn))
        np.testing.assert_allclose(found, stored[s], atol=1e-6)
    with h5py.File(out) as file:
        assert (file.attrs["run"], file.attrs["step"], file.attrs["estimate"]) == (str(debug_run), step, estimate)
        assert (file.attrs["stage"], file.attrs["set"]) == (stage, "test")
        assert dict(file["1/movie10_life01_run-1"].attrs) == {"series": "movie10", "run": "life01", "first_tr": 0}
    assert [path.name for path in out.parent.iterdir()] == ["p.h5"]


def test_runs_without_bold_are_predicted_for_everyone(
    debug_run: Path, tiny_source: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    out = tmp_path / "s7.h5"
    assert main(["predict", str(debug_run), "--set", "s7", "--out", str(out), S7]) == 0
    predictions = read(out)
    lengths = {s.key: s.n_trs for s in Shards(tiny_shards).manifest.samples if s.series == "friends_s7"}
    assert sorted(predictions) == ["1", "2", "3", "5"]
    reached = []
    with h5py.File(tiny_source / "truth.h5") as truth:
        for label, runs in predictions.items():
            assert {key: values.shape for key, values in runs.items()} == {k: (n, 20) for k, n in lengths.items()}
            assert all(values.dtype == np.float32 for values in runs.values())
            signals = [truth[f"{label}/{key}"][:] for key in runs]
            cut = [values[: len(signal)] for values, signal in zip(runs.values(), signals, strict=True)]
            reached.append(pearson(np.concatenate(cut), np.concatenate(signals)).mean())
    assert np.mean(reached) > 0.15, "what is predicted has to do with what the runs would have evoked"


def test_a_subject_without_bold_of_a_run_is_predicted_too_and_a_filter_is_kept(debug_run: Path, tmp_path: Path) -> None:
    whole, filtered = tmp_path / "whole.h5", tmp_path / "filtered.h5"
    arguments = ["predict", str(debug_run), "--set", "val", "--stage", "1"]
    runs = "datasets.val.filter={runs: [s06e01a, s07e01a]}"
    assert main([*arguments, "--out", str(whole), runs]) == 0
    more = "datasets.val.filter={runs: [s06e01a, s07e01a], subjects: [2, 5], trs: [3, 20]}"
    assert main([*arguments, "--out", str(filtered), more]) == 0
    assert sorted(read(whole)) == ["1", "2", "3", "5"] and sorted(read(filtered)) == ["2", "5"]
    for label, runs_of in read(filtered).items():
        assert {key: values.shape for key, values in runs_of.items()} == {
            "friends_s06e01a": (17, 20), "friends_s7_s07e01a": (17, 20),
        }  # fmt: skip
        assert sorted(read(whole)[label]) == sorted(runs_of)
    with h5py.File(filtered) as file:
        assert file["2/friends_s7_s07e01a"].attrs["first_tr"] == 3


def test_samples_differ_and_the_first_is_the_one_that_is_scored(debug_run: Path, tmp_path: Path) -> None:
    arguments = ["predict", str(debug_run), "--set", "s7", "--estimate", "sample", S7]
    assert main([*arguments, "--out", str(tmp_path / "one.h5")]) == 0
    assert main([*arguments, "--samples", "3", "--out", str(tmp_path / "three.h5")]) == 0
    one, three = read(tmp_path / "one.h5")["3"], read(tmp_path / "three.h5")["3"]
    for key, values in three.items():
        assert values.shape[0] == 3 and one[key].shape == (1, *values.shape[1:])
        np.testing.assert_array_equal(values[0], one[key][0])
        assert np.abs(np.corrcoef(values.reshape(3, -1)) - np.eye(3)).max() < 0.5


def test_a_submission_is_what_the_challenge_takes(debug_run: Path, tiny_source: Path, tmp_path: Path) -> None:
    for name, series, override in (("s7", "friends_s7", S7), ("ood", "ood", OOD)):
        out, plain = tmp_path / f"{name}.zip", tmp_path / f"{name}.h5"
        arguments = ["predict", str(debug_run), "--set", name, override]
        assert main([*arguments, "--format", "algonauts", "--out", str(out)]) == 0
        assert main([*arguments, "--out", str(plain)]) == 0
        with zipfile.ZipFile(out) as archive:
            assert archive.namelist() == [f"fmri_predictions_{series}.npy"]
            content = np.load(io.BytesIO(archive.read(archive.namelist()[0])), allow_pickle=True).item()
        assert sorted(content) == ["sub-01", "sub-02", "sub-03", "sub-05"]
        for subject, runs in content.items():
            folder = tiny_source / f"algonauts_2025.competitors/fmri/{subject}/target_sample_number"
            (path,) = folder.glob(f"*{series.replace('_', '-')}*")
            wanted = np.load(path, allow_pickle=True).item()
            assert {run: values.shape for run, values in runs.items()} == {run: (n, 20) for run, n in wanted.items()}
            for run, values in runs.items():
                assert values.dtype == np.float32
                whole = read(plain)[str(int(subject[-2:]))][f"{series}_{run}"]
                np.testing.assert_array_equal(values, whole[: len(values)])


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--set", "s8"], ["--set: no such set in the run: found s8", "train, val, test", "datasets.s8.filter"]),
        (["--set", "s7", "datasets.s7.filter.seasons=[8]"], ["datasets.s7", "not in the shards", "found 8"]),
        (["--set", "val", "--samples", "3"], ["--samples", "--estimate sample"]),
        (["--set", "val", "--estimate", "sample", "--samples", "0"], ["--samples", "found 0"]),
        (["--set", "val", "--estimate", "sample", "--stage", "1"], ["--estimate", "stage 1 has a mean"]),
        (["--set", "val", "--format", "algonauts"], ["datasets.val: no submission: found runs with BOLD"]),
        (["--set", "val", "bold.standardise=subject"], ["bold.standardise: the model was trained with another value"]),
        (["--set", "val", "stage1.model.embed_dim=999"], ["stage1.model.embed_dim:", "found 999, expected"]),
        (["--set", "val", "stage2.cfm.sigma_min=0.5"], ["stage2.cfm.sigma_min:", "found 0.5, expected 0.0001"]),
        (["--set", "s7", S7, "--format", "algonauts", "--estimate", "sample", "--samples", "2"], ["--samples"]),
        (["--set", "x", "datasets.x.filter.runs=[s07*, chap*]", "--format", "algonauts"], ["friends_s7, ood"]),
        (["--set", "s7", "datasets.s7.filter.runs=[s07e01b]", "--format", "algonauts"], ["lacks", "s7_s07e01a"]),
        (["--set", "s7", S7, "datasets.s7.filter.trs=[1, null]", "--format", "algonauts"], ["cuts s07e01a"]),
        (["--set", "s7", S7, "datasets.s7.filter.subjects=[1]", "--format", "algonauts"], ["filter.subjects"]),
    ],
)  # fmt: skip
def test_what_cannot_be_predicted_is_refused_and_leaves_nothing(
    debug_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], parts: list[str]
) -> None:
    message = refused(capsys, "predict", str(debug_run), "--out", str(tmp_path / "p"), *options)
    assert all(part in message for part in parts), message
    assert list(tmp_path.iterdir()) == []


def test_no_file_is_overwritten_and_no_run_is_invented(
    debug_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.h5").write_text("mine")
    out = ["--set", "val", "--out", str(tmp_path / "p.h5")]
    assert "p.h5 exists" in refused(capsys, "predict", str(debug_run), *out)
    assert (tmp_path / "p.h5").read_text() == "mine"
    assert "holds no training of stage 1" in refused(capsys, "predict", str(tmp_path), *out)
    deeper = ["--set", "val", "--out", str(tmp_path / "p.h5" / "x")]
    assert "cannot be written" in refused(capsys, "predict", str(debug_run), *deeper)


def test_a_failure_half_way_leaves_nothing(debug_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import trainer.predict as module

    estimated, calls = module.estimated, []

    def fails(*arguments: object) -> np.ndarray:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return estimated(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "estimated", fails)
    request = Request.of("val", "mean", None)
    with pytest.raises(KeyboardInterrupt):
        predict(RunDirectory(debug_run), request, tmp_path / "p.h5", stage=None, form="h5", overrides=[])
    assert len(calls) == 2 and list(tmp_path.iterdir()) == []


def make_study(tiny_shards: Path, debug_config: Path) -> Study:
    return Study(load_config(debug_config, [f"data.shards={tiny_shards}", S7]))


def test_a_prediction_that_is_not_finite_is_refused_by_its_run(
    debug_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.predict.estimated", lambda *_: np.full((4, 3, 2), np.inf, np.float32))
    message = refused(capsys, "predict", str(debug_run), "--set", "test", "--out", str(tmp_path / "p"))
    assert "datasets.test: the model's arithmetic overflows in run movie10_figures01_run-1: expected" in message
    assert list(tmp_path.iterdir()) == []


def test_runs_left_out_of_the_shards_or_of_unknown_length_make_no_submission(
    tiny_shards: Path, debug_config: Path
) -> None:
    from dataclasses import replace

    from trainer.data.manifest import Skipped

    study = make_study(tiny_shards, debug_config)
    manifest = study.manifest
    study.shards.manifest = replace(manifest, skipped=(Skipped("friends_s7_s07e03a", "bad"),))
    with pytest.raises(InputError, match=r"lacks run\(s\) of friends_s7: found friends_s7_s07e03a"):
        wanted_predictions(study, "s7")
    study.shards.manifest = replace(manifest, dropped_parcels=(3, 17))
    with pytest.raises(InputError, match=r"no submission: parcels were left out: found without columns 3, 17"):
        wanted_predictions(study, "s7")
    study.shards.manifest = replace(manifest, samples=tuple(replace(s, wanted={"1": 5}) for s in manifest.samples))
    with pytest.raises(InputError, match="how many TRs of subject 2"):
        wanted_predictions(study, "s7")


def test_a_submission_that_differs_from_what_is_wanted_is_named() -> None:
    shapes = Wanted("s", {"a": {"1": 3, "5": 2}, "b": {"1": 4, "5": 4}}).shapes(2)
    assert shapes == {"sub-01": {"a": (3, 2), "b": (4, 2)}, "sub-05": {"a": (2, 2), "b": (4, 2)}}

    def content() -> dict[str, dict[str, np.ndarray]]:
        return {s: {run: np.ones(shape, np.float32) for run, shape in runs.items()} for s, runs in shapes.items()}

    check_submission(content(), shapes)
    wrong = content()
    del wrong["sub-05"]
    with pytest.raises(InputError, match="subjects: found"):
        check_submission(wrong, shapes)
    wrong = content()
    del wrong["sub-01"]["b"]
    with pytest.raises(InputError, match="runs of sub-01"):
        check_submission(wrong, shapes)
    for array in (np.ones((2, 2), np.float32), np.ones((3, 2)), np.full((3, 2), np.nan, np.float32)):
        wrong = content()
        wrong["sub-01"]["a"] = array
        with pytest.raises(InputError, match="submission: sub-01: a: "):
            check_submission(wrong, shapes)
    with pytest.raises(InputError, match="numbers its subjects: found anna"):
        Wanted("s", {"a": {"anna": 3}})


def test_the_restricted_reader_reads_a_submission_back() -> None:
    buffer = io.BytesIO()
    content = {"sub-01": {"a": np.arange(6, dtype=np.float32).reshape(3, 2)}}
    np.save(buffer, content)  # type: ignore[arg-type]
    buffer.seek(0)
    np.testing.assert_array_equal(unpickled_npy(buffer)["sub-01"]["a"], content["sub-01"]["a"])


def test_a_training_goes_on_where_a_set_has_no_bold_and_says_so(
    debug_config: Path, tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    arguments = ["train", "--config", str(debug_config), "--run", str(run), "--stage", "1", S7, "tracker=none"]
    assert main([*arguments, f"data.shards={tiny_shards}", "stage1.epochs=1"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("datasets.s7: no run has BOLD, so it is not scored; `predict --set s7` predicts it") == 1
    assert {json.loads(path.read_text())["set"] for path in run.rglob("scores/*.json")} == {"val", "test"}
    assert main(["predict", str(run), "--set", "s7", "--out", str(tmp_path / "s7.h5")]) == 0
    assert sorted(read(tmp_path / "s7.h5")["1"]) == ["friends_s7_s07e01a", "friends_s7_s07e01b"]
