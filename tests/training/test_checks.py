"""Data that would be learnt from wrongly are refused or named before anything is trained, and learnt from rightly."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import trainer
from tests.training.conftest import ALONE, LENGTHS, Lab
from tools.make_shards import main as make_shards
from trainer.cli import main
from trainer.data.statistics import starting_level
from trainer.errors import InputError
from trainer.models.decoder import Decoder
from trainer.training.checks import bold_rank, check

MakeLab = Callable[..., Lab]


def nearly_dead(model: str, run: str, values: np.ndarray) -> np.ndarray:
    """A further column: a class probability of 1e-7 in training, and 0.9 in a third of the validation run."""
    column = np.full((len(values), 1), 6e-8)
    column[::7] = 1.2e-7
    if run == "b1":
        column[10:20] = 0.9
    return np.concatenate([values, column], axis=1)


def scanner_units(subject: str, run: str, values: np.ndarray) -> np.ndarray:
    return 10_000 + 50 * values


def scores(lab: Lab, stage: int) -> list[dict[str, object]]:
    folder = lab.run / f"stage{stage}" / "scores"
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*-val-mean.json"))]


def weights(lab: Lab, stage: str = "stage1") -> dict[str, torch.Tensor]:
    folder = max((lab.run / stage / "checkpoints").iterdir())
    return load_file(folder / "model.safetensors")


def predicted(lab: Lab, *more: str) -> dict[str, np.ndarray]:
    out = lab.folder / f"p{len(list(lab.folder.glob('p*.h5')))}.h5"
    assert main(["predict", str(lab.run), "--set", "val", "--out", str(out), *more]) == 0
    with h5py.File(out) as file:
        return {label: file[label]["s_b1"][:] for label in file}


def refused(capsys: pytest.CaptureFixture[str], lab: Lab, *arguments: str) -> str:
    """The one line with which a training ends before it begins."""
    assert lab.train(*arguments) == 2
    assert not lab.run.exists()
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


# ---- columns


def test_a_column_that_hardly_varies_in_training_is_named_and_says_nothing(
    make_lab: MakeLab, capsys: pytest.CaptureFixture[str]
) -> None:
    lab = make_lab(features=nearly_dead)
    assert lab.train("--stage", "1") == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert len(warnings) == 1, "once, for both streams, and not again for folds"
    assert "m1/layer:6 (1 of 7); m2/layer:4 (1 of 5)" in warnings[0] and "stage1.keep_columns" in warnings[0]
    assert weights(lab)["streams.0.scale"].isinf().nonzero().tolist() == [[6]]
    assert all(np.abs(values).max() < 10 for values in predicted(lab).values())


def test_keep_columns_keeps_a_column(make_lab: MakeLab, capsys: pytest.CaptureFixture[str]) -> None:
    lab = make_lab(features=nearly_dead)
    assert lab.train("--stage", "1", "stage1.keep_columns=[m1/layer:6]") == 0
    left_out, far = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert "m1/layer:6" not in left_out and "m2/layer:4" in left_out
    assert "datasets.val: columns reach z-scores" in far and "m1/layer:6 (1 of 7)" in far and "m2" not in far
    assert 0 < weights(lab)["streams.0.scale"][6] < 1e-6
    assert np.abs(predicted(lab)["1"]).max() > 1e3


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("stage1.keep_columns=[m1/layer:6]", "found m1/layer:6, expected m1/layer:0 to m1/layer:5"),
        ("stage1.keep_columns=[m3/layer:0]", "not a stream of include_features: found m3/layer:0"),
        ("stage1.keep_columns=[m1/layer]", "stage1.keep_columns.0: found 'm1/layer'"),
        ("bold.keep_parcels=[12]", "bold.keep_parcels: no such parcel: found 12, expected 0 to 11"),
        ("bold.keep_parcels=some", "bold.keep_parcels: found 'some', expected a valid list"),
    ],
)
def test_what_is_kept_must_be_there(
    make_lab: MakeLab, capsys: pytest.CaptureFixture[str], override: str, expected: str
) -> None:
    assert expected in refused(capsys, make_lab(), override)


# ---- units of BOLD


def test_bold_in_scanner_units_is_learnt_as_z_scores_are(make_lab: MakeLab, capsys: pytest.CaptureFixture[str]) -> None:
    lab = make_lab(bold=scanner_units)
    assert lab.train("--stage", "1") == 0
    warning = capsys.readouterr().err
    assert "bold.standardise: BOLD of subjects 1, 2" in warning and "|mean| 1e+04" in warning
    raw = scores(lab, 1)[-1]["pearson_r"]
    assert lab.train("--stage", "1", "--overwrite", "bold.standardise=run") == 0
    assert "bold.standardise" not in capsys.readouterr().err
    assert raw == pytest.approx(scores(lab, 1)[-1]["pearson_r"], abs=0.1)


@pytest.mark.parametrize("factor", [1e-25, 1e17])
def test_bold_whose_squares_float32_cannot_sum_is_refused_unless_it_is_standardised(
    make_lab: MakeLab, capsys: pytest.CaptureFixture[str], factor: float
) -> None:
    lab = make_lab(bold=lambda subject, run, x: x * factor)
    line = refused(capsys, lab)
    assert "bold.standardise: BOLD of subject 1" in line and "expected 1e-15 to 1e+15" in line
    assert "bold.standardise=run" in line
    assert lab.train("--stage", "1", "bold.standardise=run") == 0
    assert all(np.isfinite(float(str(score["pearson_r"]))) for score in scores(lab, 1))


def test_features_that_float32_cannot_divide_by_are_refused(
    make_lab: MakeLab, capsys: pytest.CaptureFixture[str]
) -> None:
    lab = make_lab()
    for path in (lab.folder / "features" / "m2").iterdir():
        with h5py.File(path, "a") as file:
            file["layer"][...] = file["layer"][:] * np.float32(1e-38)
    arguments = ["--layout", str(lab.folder / "layout.yaml"), "--root", str(lab.folder), "--float32", "m2/layer"]
    assert make_shards([*arguments, "--out", str(lab.folder / "shards"), "--overwrite"]) == 0
    capsys.readouterr()
    line = refused(capsys, lab)
    assert "include_features: m2/layer" in line and "expected 1e-30 or more" in line


@pytest.mark.parametrize("decoders", [(True, True), (True, False), (False, True)])
def test_biases_start_at_the_level_of_each_subject(make_lab: MakeLab, decoders: tuple[bool, bool]) -> None:
    lab = make_lab(bold=lambda subject, run, x: x + (1000 if subject == "sub-01" else -500) * (np.arange(12) < 5))
    study = lab.study()
    spans = study.spans["train"]
    level, count = (torch.from_numpy(a) for a in starting_level(study.shards, spans, study.scaling, spans))
    assert count.tolist() == [80, 80]
    assert (level[:, 5:] == 0).all() and (level[0, :5] - 1000).abs().max() < 5 > (level[1, :5] + 500).abs().max()
    decoder = Decoder(3, 2, 12, *decoders, kernel_size=1)
    decoder.start_at(level, count)
    found = decoder(torch.zeros(1, 4, 3), None)[0, :, 0].double()
    expected = level if decoders[1] else level.mean(0, keepdim=True)
    assert (found - expected).abs().max() < 1e-3


@pytest.mark.parametrize(("bold", "mode"), [(None, "none"), (scanner_units, "run"), (scanner_units, "subject")])
def test_bold_without_a_level_leaves_the_biases_at_0(make_lab: MakeLab, bold: object, mode: str) -> None:
    study = make_lab(bold=bold).study(f"bold.standardise={mode}")
    spans = study.spans["train"]
    assert not starting_level(study.shards, spans, study.scaling, spans)[0].any()


def test_a_fold_takes_its_own_mean_of_the_parcels_that_the_training_set_judges(make_lab: MakeLab) -> None:
    shifts = {"a1": 3.0, "a2": -3.0, "b1": 0.0}
    study = make_lab(bold=lambda subject, run, x: x + shifts[run] + 1000 * (np.arange(12) == 2)).study()
    spans = study.spans["train"]
    level, count = starting_level(study.shards, spans[:1], study.scaling, judged_by=spans)
    assert count.tolist() == [40, 40]
    assert np.flatnonzero(level[0]).tolist() == [2], "a mean of 3 in one run is no level of the whole"
    assert level[0, 2] == pytest.approx(1003, abs=1)


def test_a_parcel_that_hardly_varies_is_scaled_like_the_others(make_lab: MakeLab) -> None:
    def bold(subject: str, run: str, values: np.ndarray) -> np.ndarray:
        if subject == "sub-02" and run != "b1":
            values[:, 3] = 1e-7 * np.arange(len(values))
        return values

    lab = make_lab(bold=bold)
    for mode in ("run", "subject"):
        study = lab.study(f"bold.standardise={mode}")
        warnings = check(study, (1, 2))
        assert len(warnings) == 1 and "subject 2: 3 (1 of 12)" in warnings[0] and "subject 1" not in warnings[0]
        kept = lab.study(f"bold.standardise={mode}", "bold.keep_parcels=[3]").scaling
        own = lab.study(f"bold.standardise={mode}", "bold.keep_parcels=null").scaling
        assert np.array_equal(kept.scale, own.scale)
        changed = study.scaling.scale != own.scale
        assert changed[..., 1, 3].any() and not changed[..., 0, :].any()
        assert np.median(study.scaling.scale[..., 1, :]) == pytest.approx(study.scaling.scale[..., 1, 3].max(), rel=0.3)
        scaled = study.shards.read(2, "bold", 0, 30)[1].copy()
        study.scaling.apply(scaled, 2, 1)
        assert np.abs(scaled[:, 3]).max() < 10


def test_a_parcel_that_varies_far_more_than_the_others_is_named(
    make_lab: MakeLab, capsys: pytest.CaptureFixture[str]
) -> None:
    def loud(subject: str, run: str, values: np.ndarray) -> np.ndarray:
        return values * np.where(np.arange(12) == 4, 1e7 if subject == "sub-01" else 1, 1)

    lab = make_lab(bold=loud)
    (warning,) = check(lab.study(), (1,))
    assert "subject 1: 4 (1 of 12). Set bold.standardise=run" in warning and "subject 2" not in warning
    assert check(lab.study("bold.standardise=subject"), (1, 2)) == []
    assert "Set bold.standardise=run: some parcels vary so much more" in refused(capsys, lab)


@pytest.mark.parametrize("mode", ["none", "subject"])
def test_a_set_in_another_unit_than_the_training_is_named(make_lab: MakeLab, mode: str) -> None:
    def mixed(subject: str, run: str, values: np.ndarray) -> np.ndarray:
        return scanner_units(subject, run, values) if (subject, run) == ("sub-02", "b1") else values

    lab = make_lab(bold=mixed)
    (warning,) = check(lab.study(f"bold.standardise={mode}"), (1, 2))
    assert warning.startswith("datasets.val: BOLD of subject 2 is in another unit than in training")
    assert "set bold.standardise=run" in warning
    assert check(lab.study("bold.standardise=run"), (1, 2)) == []


def test_components_that_show_the_means_of_runs_are_not_called_a_collapse(
    make_lab: MakeLab, capsys: pytest.CaptureFixture[str]
) -> None:
    lab = make_lab(bold=lambda subject, run, x: x + {"a1": 8, "a2": -8, "b1": 0}[run])
    assert lab.train() == 0
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if "latents lie between" in line]
    assert "runs differ in their means" in warning and "bold.standardise: run" in warning and "collapse" not in warning


@pytest.mark.parametrize("mode", ["none", "subject", "run"])
def test_bold_in_one_unit_is_not_spoken_of(make_lab: MakeLab, mode: str) -> None:
    assert check(make_lab().study(f"bold.standardise={mode}"), (1, 2)) == []


# ---- dimensions of BOLD


@pytest.mark.parametrize(
    ("bold", "parcels", "arguments", "expected"),
    [
        (
            None,
            40,
            ["datasets.train.filter.trs=[0, 6]", "stage2.latent_dim=24"],
            "found 24, expected at most 22, with 24",
        ),
        (lambda s, r, x: x[:, [0, 1, 2] * 4], 12, [], "found 4, expected at most 3"),
        (lambda s, r, x: 0 * x + 3, 12, [], "the BOLD to learn from does not vary: found 160 TRs"),
        (lambda s, r, x: 0 * x + 3, 12, ["--stage", "1"], "the BOLD to learn from does not vary"),
        (None, 1, [], "stage 2 needs BOLD of at least 2 parcels: found 1. Train stage 1 alone (--stage 1)."),
    ],
)
def test_bold_of_too_few_dimensions_is_refused_at_the_start(
    make_lab: MakeLab,
    capsys: pytest.CaptureFixture[str],
    bold: object,
    parcels: int,
    arguments: list[str],
    expected: str,
) -> None:
    assert expected in refused(capsys, make_lab(bold=bold, parcels=parcels), *arguments)


def test_one_parcel_is_enough_for_stage_1(make_lab: MakeLab) -> None:
    lab = make_lab(parcels=1)
    assert lab.train("--stage", "1") == 0
    assert main(["evaluate", str(lab.run)]) == 0


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_the_rank_of_bold_is_that_of_the_centred_matrix(data: st.DataObject) -> None:
    parcels, inner = data.draw(st.integers(1, 30)), data.draw(st.integers(1, 8))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    mix = torch.randn(inner, parcels, generator=generator, dtype=torch.float64)
    runs = data.draw(st.lists(st.tuples(st.integers(0, 1), st.integers(1, 5)), min_size=1, max_size=4))
    series = [(s, torch.randn(n, inner, generator=generator, dtype=torch.float64) @ mix + 5.0 * s) for s, n in runs]
    centred = []
    for subject in {s for s, _ in series}:
        whole = torch.cat([x for s, x in series if s == subject])
        centred.append(whole - whole.mean(0))
    expected = int(torch.linalg.matrix_rank(torch.cat(centred), rtol=1e-6))
    enough = data.draw(st.integers(1, parcels))
    assert bold_rank(series, parcels, enough) == min(expected, enough)


def test_the_rank_is_known_before_all_runs_are_read() -> None:
    def series() -> object:
        yield 0, torch.randn(9, 20)
        raise AssertionError("8 dimensions were there")

    assert bold_rank(series(), 20, 8) == 8  # type: ignore[arg-type]


# ---- subjects


def test_a_subject_who_is_not_trained_is_predicted_by_the_shared_decoder_and_does_not_choose(
    make_lab: MakeLab, capsys: pytest.CaptureFixture[str]
) -> None:
    lab = make_lab()
    assert lab.train(ALONE) == 0
    assert "datasets.val: subject 2 is not in the training set" in capsys.readouterr().err
    found = weights(lab)
    assert not found["decoder.own_weight"][1].any() and not found["decoder.own_bias"][1].any()
    assert found["decoder.own_weight"][0].any()
    alone, flow = scores(lab, 1)[-1], scores(lab, 2)[-1]
    assert alone["untrained_subjects"] == ["2"] and set(alone["per_subject"]) == {"1", "2"}  # type: ignore[call-overload]
    for stage in (1, 2):
        for folder in (lab.run / f"stage{stage}" / "checkpoints").iterdir():
            assert json.loads((folder / "meta.json").read_text())["trained_subjects"] == ["1"]

    assert lab.train(ALONE, "datasets.val.filter.subjects=['1']", "--overwrite") == 0
    assert scores(lab, 2)[-1]["flow_loss"] == flow["flow_loss"], "the loss that chooses knows the trained subject alone"
    assert scores(lab, 1)[-1]["pearson_r"] == alone["per_subject"]["1"]  # type: ignore[index]
    assert "untrained_subjects" not in scores(lab, 1)[-1]


def test_scores_predictions_and_exports_know_a_subject_who_is_not_trained(make_lab: MakeLab) -> None:
    lab = make_lab()
    assert lab.train(ALONE) == 0
    assert main(["evaluate", str(lab.run), "--step", "all"]) == 0
    (path,) = (lab.run / "stage2" / "scores").glob("*-val-distribution.json")
    judged = json.loads(path.read_text())
    for name in ("flow", "independent", "full_covariance"):
        assert all(value is not None for value in judged[name].values()), name
    folder = lab.folder / "export"
    assert main(["export", str(lab.run), "--out", str(folder)]) == 0
    assert "Subjects, in order: 1, 2 (not trained, and predicted by what the others share: 2)" in (
        (folder / "README.md").read_text()
    )
    study = lab.study()
    number = next(i for i, sample in enumerate(study.manifest.samples) if sample.run == "b1")
    features = {s.name: study.shards.read(number, s.name, 0, LENGTHS["b1"]) for s in study.streams}
    model = trainer.load(folder)
    assert model.facts["trained_subjects"] == ["1"]
    of_run, exported = predicted(lab), model.predict(features)
    for row, label in enumerate(model.subjects):
        assert np.array_equal(exported[row], of_run[label])


def test_a_refit_learns_from_a_subject_of_validation(make_lab: MakeLab) -> None:
    lab = make_lab(bold=scanner_units)
    assert lab.train(ALONE, "train.refit=true", "--stage", "1") == 0
    refit = weights(lab, "stage1/refit")
    assert refit["decoder.own_weight"][1].any()
    level = refit["decoder.shared.bias"] + refit["decoder.own_bias"][1]
    assert (level - 10_000).abs().max() < 100


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["stage1.model.with_shared_decoder=false"], "datasets.val: subject 2 is not in the training set, and nothing"),
        (["stage2.subjects=separate", "stage2.parametrisation=velocity"], "or change stage2.parametrisation"),
        (["datasets.val.filter.subjects=['2']"], "none can choose the step: found 2, expected some of 1"),
    ],
)
def test_a_subject_whom_nothing_could_predict_is_refused(
    make_lab: MakeLab, capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str
) -> None:
    assert expected in refused(capsys, make_lab(), ALONE, *arguments)


def test_nothing_is_predicted_of_a_subject_without_any_decoder(
    make_lab: MakeLab, capsys: pytest.CaptureFixture[str]
) -> None:
    lab, val = make_lab(), "datasets.val.filter.subjects=['1']"
    assert lab.train(ALONE, val, "--stage", "1", "stage1.model.with_shared_decoder=false") == 0
    arguments = ["predict", str(lab.run), "--set", "val", "--out", str(lab.folder / "p.h5")]
    assert main([*arguments, "datasets.val.filter.subjects=null"]) == 2
    assert "datasets.val: subjects that were not trained" in capsys.readouterr().err
    assert main(arguments) == 0
    assert main(["export", str(lab.run), "--out", str(lab.folder / "export")]) == 0
    features = {"m1/layer": np.ones((5, 6), np.float32), "m2/layer": np.ones((5, 4), np.float32)}
    found = trainer.load(lab.folder / "export").predict(features)
    assert np.isfinite(found[0]).all() and np.isnan(found[1]).all()


def test_a_fold_without_a_subject_predicts_them_by_the_shared_decoder(
    make_lab: MakeLab, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    lab = make_lab(bold=lambda subject, run, x: None if (subject, run) == ("sub-02", "a2") else x)
    assert "subject 2 is in one fold only" in refused(capsys, lab, "stage1.model.with_shared_decoder=false")
    assert lab.train() == 0
    owns = [
        load_file(max((lab.run / f"stage2/anchor/fold_{fold}/checkpoints").iterdir()) / "model.safetensors")
        for fold in (1, 2)
    ]
    assert sorted(bool(own["decoder.own_weight"][1].any()) for own in owns) == [False, True]


def test_the_checks_are_made_for_stages_that_begin(make_lab: MakeLab) -> None:
    study = make_lab(bold=lambda s, r, x: x[:, [0, 1, 2] * 4]).study()
    with pytest.raises(InputError, match=r"stage2\.latent_dim"):
        check(study, (1, 2))
    assert check(study, (1,)) == check(study, ()) == []
