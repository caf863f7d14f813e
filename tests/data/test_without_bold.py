"""Series with features but no BOLD: built, checked, left out of training and scores, kept for predictions."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds

from tests.data.conftest import FOLDERS, LAYOUT, PARCELS, Invented
from tools.check_shards import main as check
from tools.make_shards import main
from trainer.config import Config, Filter
from trainer.data.layout import load_layout
from trainer.data.manifest import MANIFEST, Manifest
from trainer.data.plan import select, select_without_bold
from trainer.data.shards import Shards
from trainer.data.statistics import bold_statistics, feature_statistics
from trainer.data.study import Study
from trainer.errors import InputError
from trainer.strict import validated

SERIES = r"""  later:
    folder: cinema
    runs: (?P<film>gamma)_(?P<part>\d+)
    target_sample_number: wanted/{subject}.npy
feature_files:"""
LENGTHS = {"gamma_1": 25, "gamma_2": 19}
SHAPES = {"Text": ("embedding", (4,)), "Video": ("deep", (2, 3)), "Audio": ("wave", (1, 5))}


@pytest.fixture
def later(invented: Invented) -> Invented:
    """The invented data with two runs of a film that nobody has seen; the audio is a TR longer."""
    invented.layout.write_text(LAYOUT.replace("feature_files:", SERIES))
    rng = np.random.default_rng(3)
    for run, n_trs in LENGTHS.items():
        for model, (dataset, shape) in SHAPES.items():
            values = rng.normal(size=(n_trs + (model == "Audio"), *shape)).astype(np.float32)
            invented.put_features(model, run, dataset, values)
            invented.features[run, model] = values
    return invented


def want(made: Invented, subject: str, **numbers: int) -> None:
    folder = made.root / "wanted"
    folder.mkdir(exist_ok=True)
    np.save(folder / f"{FOLDERS[subject]}.npy", numbers)  # type: ignore[arg-type]


def built(made: Invented, out: Path, *more: str) -> Shards:
    assert main(made.arguments(out, *more)) == 0
    return Shards(out)


def refused(made: Invented, out: Path, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    assert main(made.arguments(out, *more)) == 2
    assert not out.exists()
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_lengths_come_from_the_features(later: Invented, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = built(later, tmp_path / "out")
    samples = {s.key: (i, s) for i, s in enumerate(shards.manifest.samples)}
    assert len(samples) == 6
    for run, n_trs in LENGTHS.items():
        i, sample = samples[f"later_{run}"]
        assert (sample.series, sample.film, sample.repeat, sample.n_trs) == ("later", "gamma", 1, n_trs)
        assert (sample.subjects, sample.wanted) == ((), {})
        assert shards.read(i, "bold", 3, 7).shape == (0, 4, PARCELS)
        audio = later.features[run, "Audio"].reshape(n_trs + 1, 5)[:n_trs]
        np.testing.assert_array_equal(shards.read(i, "audio/mono", 0, n_trs), audio)
    assert check([str(tmp_path / "out")]) == 0
    assert "later: 2 run(s) without BOLD, lengths from the features" in capsys.readouterr().out


def test_lengths_that_are_wanted_win_and_the_longest_of_the_subjects_counts(later: Invented, tmp_path: Path) -> None:
    want(later, "a", gamma_1=26, gamma_2=19)
    want(later, "b", gamma_1=27, gamma_2=18)
    want(later, "3", gamma_1=25, gamma_2=17)
    shards = built(later, tmp_path / "out")
    i, sample = next((i, s) for i, s in enumerate(shards.manifest.samples) if s.run == "gamma_1")
    assert (sample.n_trs, sample.wanted) == (27, {"a": 26, "b": 27, "3": 25})
    text = later.features["gamma_1", "Text"].astype(np.float16)
    np.testing.assert_array_equal(shards.read(i, "text.v2/emb", 0, 27), [*text, text[-1], text[-1]])
    assert check([str(tmp_path / "out")]) == 0


def test_plain_webdataset_reads_such_a_sample(later: Invented, tmp_path: Path) -> None:
    built(later, tmp_path / "out")
    url = str(tmp_path / "out" / "shard-00000.tar")
    samples = {s["__key__"]: s for s in wds.WebDataset(url, shardshuffle=False).decode()}
    sample = samples["later_gamma_1"]
    assert sample["meta.json"]["subjects"] == [] and sample["bold.npy"].shape == (0, 25, PARCELS)


def test_without_such_a_series_no_byte_knows_of_it(invented: Invented, later: Invented, tmp_path: Path) -> None:
    """The layout names the series, nobody has extracted its features."""
    invented.layout.write_text(LAYOUT)
    built(invented, tmp_path / "plain")
    invented.layout.write_text(LAYOUT.replace("feature_files:", SERIES.replace("gamma", "delta")))
    built(invented, tmp_path / "named")
    first, second = ({p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in ("plain", "named"))
    assert first == second
    assert set(json.loads(first[MANIFEST])["samples"][0]) == {
        "key", "shard", "series", "run", "repeat", "season", "episode", "film", "part", "n_trs", "subjects", "arrays",
    }  # fmt: skip


def test_a_series_that_is_asked_for_must_be_there(
    later: Invented, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    later.layout.write_text(LAYOUT.replace("feature_files:", SERIES.replace("gamma", "delta")))
    assert "--series: no features of later" in refused(later, tmp_path / "out", capsys, "--series", "cinema", "later")
    later.layout.write_text(LAYOUT.replace("feature_files:", SERIES))
    assert "no BOLD file found for subject a" in refused(later, tmp_path / "out", capsys, "--series", "later")


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ({"a": {"gamma_1": 28, "gamma_2": 19}}, ["Text", "gamma_1", "found 25 TRs", "within 2 TRs of the 28 TRs"]),
        ({"a": {"gamma_1": 25}, "b": {"gamma_1": 22}}, ["run gamma_1", "{'a': 25, 'b': 22}", "within 2 TRs"]),
        ({"a": {"gamma_1": 25, "gamma_3": 25}}, ["no feature file of run gamma_3", "stimuli/Text"]),
        ({"a": {"delta": 25}}, ["series.later.runs", "found delta"]),
    ],
)
def test_what_does_not_fit_is_named(
    later: Invented, tmp_path: Path, capsys: pytest.CaptureFixture[str], numbers: dict[str, dict], words: list[str]
) -> None:
    for subject, wanted in numbers.items():
        want(later, subject, **wanted)
    message = refused(later, tmp_path / "out", capsys)
    assert all(word in message for word in words), message


def test_features_of_one_run_must_agree(later: Invented, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    later.put_features("Audio", "gamma_2", "wave", np.zeros((22, 1, 5), np.float32))
    message = refused(later, tmp_path / "out", capsys)
    assert "Audio" in message and "found 22 TRs, expected within 2 TRs of the 19 TRs" in message
    shards = built(later, tmp_path / "out", "--skip-bad")
    assert [s.run for s in shards.manifest.skipped] == ["later_gamma_2"]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("    runs: (?P<film>gamma)_(?P<part>\\d+)\n", "", "runs: missing"),
        ("{subject}.npy", "all.npy", "found no field {subject}"),
        ("    folder: cinema", "    bold: {file: '{subject}.h5', dataset: '{run}'}", "found beside bold"),
    ],
)
def test_mistakes_in_the_layout(tmp_path: Path, old: str, new: str, words: str) -> None:
    path = tmp_path / "layout.yaml"
    assert old in SERIES
    path.write_text(LAYOUT.replace("feature_files:", SERIES.replace(old, new)))
    with pytest.raises(InputError, match=words):
        load_layout(path)


def configured(shards: Path, **sets: dict) -> Config:
    datasets = {"train": {"films": ["alpha"]}, "val": {"films": ["beta"], "repeats": [1]}, **sets}
    content = {
        "data": {"shards": str(shards)}, "include_features": ["text.v2/emb"], "val_set_name": "val",
        "datasets": {name: {"filter": chosen} for name, chosen in datasets.items()}, "stage2": {"latent_dim": 2},
    }  # fmt: skip
    return validated(Config, content, "test")


def test_training_and_scores_never_see_it(later: Invented, tmp_path: Path) -> None:
    shards = built(later, tmp_path / "out")
    manifest = shards.manifest
    seen = select(manifest, Filter())
    assert [manifest.samples[span.sample].film for span in seen] == ["alpha", "alpha", "beta", "beta"]
    unseen = select_without_bold(manifest, Filter(trs=[2, None]))
    assert [(manifest.samples[s.sample].run, s.start, s.stop, s.subjects) for s in unseen] == [
        ("gamma_1", 2, 25, (False,) * 3), ("gamma_2", 2, 19, (False,) * 3),
    ]  # fmt: skip
    assert select(manifest, Filter(films=["gamma"])) == []
    study = Study(configured(tmp_path / "out", gamma={"films": ["gamma"]}, all={}))
    assert study.without_bold() == ["gamma"]
    assert study.scored_sets(refit=False) == ["val", "all"]
    assert len(study.spans["all"]) == 4 and len(study.unseen["all"]) == 2


def test_statistics_are_those_of_shards_without_it(later: Invented, tmp_path: Path) -> None:
    with_it = built(later, tmp_path / "with")
    without = built(later, tmp_path / "without", "--series", "cinema")
    for shards in (with_it, without):
        assert len(select(shards.manifest, Filter())) == 4
    found, expected = (bold_statistics(s, select(s.manifest, Filter())) for s in (with_it, without))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)
    found, expected = (
        feature_statistics(s, select(s.manifest, Filter()), s.manifest.streams)[0] for s in (with_it, without)
    )
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_set_without_bold_can_neither_be_trained_on_nor_validate(later: Invented, tmp_path: Path) -> None:
    built(later, tmp_path / "out")
    for name in ("train", "val"):
        with pytest.raises(InputError, match=rf"datasets\.{name}: no run of this set has BOLD"):
            Study(configured(tmp_path / "out", **{name: {"films": ["gamma"]}}))
    study = Study(configured(tmp_path / "out", gamma={"films": ["gamma"]}))
    with pytest.raises(
        InputError, match=r"no run of this set has BOLD.*`predict --set gamma`.*expected one of train, val"
    ):
        study.check_scorable("gamma")
    with pytest.raises(InputError, match="no such set in the run: found gama, expected one of train, val, gamma"):
        study.check_scorable("gama")


@pytest.mark.parametrize("wanted", [{"a": 26}, {"a": 20}, {"z": 25}, {"a": 25, "b": 0}])
def test_wrong_numbers_in_the_manifest_are_found(
    later: Invented, tmp_path: Path, capsys: pytest.CaptureFixture[str], wanted: dict[str, int]
) -> None:
    want(later, "a", gamma_1=25, gamma_2=19)
    built(later, tmp_path / "out")
    path = tmp_path / "out" / MANIFEST
    content = json.loads(path.read_text())
    next(s for s in content["samples"] if s["run"] == "gamma_1")["wanted"] = wanted
    rest = {k: v for k, v in content.items() if k not in ("format", "sha256")}
    content["sha256"] = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(content))
    assert Manifest.read(tmp_path / "out").samples
    capsys.readouterr()
    assert check([str(tmp_path / "out")]) == 2
    assert "later_gamma_1: wanted: found" in capsys.readouterr().out
