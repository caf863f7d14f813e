"""The synthetic data have the shape of Algonauts 2025, and the ceiling they claim can be reached from the features."""

from __future__ import annotations

import json
import re
from pathlib import Path

import h5py
import numpy as np
import pytest

from tools import make_shards, make_synthetic
from trainer.data.shards import Shards

LAYOUT = Path(__file__).resolve().parents[1] / "configs/datasets/algonauts2025.yaml"


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data set of the demo."""
    folder = tmp_path_factory.mktemp("full") / "data"
    assert make_synthetic.main(["--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def shards(full: Path) -> Shards:
    """Its shards, with the layout's own default streams."""
    out = full.parent / "shards"
    assert make_shards.main(["--layout", str(LAYOUT), "--root", str(full), "--out", str(out)]) == 0
    return Shards(out)


def _pearson(one: np.ndarray, other: np.ndarray) -> float:
    one, other = one - one.mean(0), other - other.mean(0)
    return float(((one * other).sum(0) / np.sqrt((one**2).sum(0) * (other**2).sum(0))).mean())


def test_files_and_data_sets_are_named_as_in_algonauts(full: Path) -> None:
    folder = full / "algonauts_2025.competitors/fmri/sub-05/func"
    prefix = "sub-05_task-{}_space-MNI152NLin2009cAsym_atlas-Schaefer18_parcel-200Par7Net"
    with h5py.File(folder / f"{prefix.format('friends')}_desc-s123456_bold.h5") as file:
        names = list(file)
        assert all(re.fullmatch(r"ses-\d{3}_task-s0[1-6]e\d\d[a-d]", name) for name in names)
        by_run = [name[:7] for name in sorted(names, key=lambda n: n.split("task-")[1])]
        assert by_run != sorted(by_run)
        assert file[names[0]].dtype == np.float32
    with h5py.File(folder / f"{prefix.format('movie10')}_bold.h5") as file:
        ends = {name.split("task-")[1] for name in file}
        assert {"bourne01", "wolf06", "figures01_run-1", "figures01_run-2", "life02_run-2"} <= ends
    assert (full / "features/Llama-3.2-3B/friends/s1/friends_s01e01a.h5").is_file()
    assert (full / "features/whisper/movie10/bourne/movie10_bourne01.h5").is_file()
    assert (full / "features/whisper/ood/chaplin/task-chaplin2_video.h5").is_file()
    wanted = np.load(folder.parent / "target_sample_number/sub-05_friends-s7_fmri_samples.npy", allow_pickle=True)
    assert set(wanted.item()) == {"s07e01a", "s07e01b", "s07e02a", "s07e02b"}


def test_shapes_and_gaps_are_those_of_real_data(shards: Shards, full: Path) -> None:
    manifest = shards.manifest
    assert manifest.subjects == ("1", "2", "3", "5") and manifest.parcels == 200 and manifest.tr == 1.49
    seen = [s for s in manifest.samples if s.subjects]
    assert len(seen) == 45 and 5500 < sum(s.n_trs for s in seen) < 7000
    assert {s.season or s.film for s in manifest.samples if not s.subjects} == {7, "chaplin", "mononoke"}
    absent = {(s.run, label) for s in seen for label in manifest.subjects if label not in s.subjects}
    assert absent == {("s05e20a", "2"), ("s04e01a", "5"), ("s04e01b", "5")}
    assert {s.layers for s in manifest.streams} == {1, 2} and len(manifest.streams) == 5
    stored = set()
    off = set()
    for model in make_synthetic.MODELS:
        for path in (full / "features" / model.folder).rglob("*.h5"):
            run = path.stem.removesuffix("_video").replace("-", "_").split("_")[1]
            n_trs = next(s.n_trs for s in manifest.samples if s.run == run)
            with h5py.File(path) as file:
                stored.add((file[model.dataset].ndim, file[model.dataset].shape[1:-1], str(file[model.dataset].dtype)))
                off.add(len(file[model.dataset]) - n_trs)
    assert stored == {(2, (), "float16"), (3, (1,), "float16"), (3, (2,), "float16"), (2, (), "float32")}
    assert off == {-2, -1, 0, 1, 2}


def test_truth_is_the_score_of_the_true_signal(shards: Shards, full: Path) -> None:
    truth = json.loads((full / "truth.json").read_text())
    assert 0.2 < truth["overall"] < 0.35 and abs(truth["overall"] - 0.28) < 0.02
    assert set(truth["seasons"]) == set("123456") and set(truth["films"]) == {"bourne", "wolf", "figures", "life"}
    chosen = {
        "6": [i for i, s in enumerate(shards.manifest.samples) if s.season == 6],
        "life": [i for i, s in enumerate(shards.manifest.samples) if s.film == "life" and s.repeat == 1],
        "5": [i for i, s in enumerate(shards.manifest.samples) if s.season == 5],
    }
    for name, samples in chosen.items():
        scores = []
        for label in shards.manifest.subjects:
            here = [i for i in samples if label in shards.manifest.samples[i].subjects]
            bold = np.concatenate([_bold(shards, i, label) for i in here])
            scores.append(_pearson(np.concatenate([_signal(full, shards, i, label) for i in here]), bold))
        claimed = truth["seasons"].get(name) or truth["films"][name]
        assert claimed == pytest.approx(np.mean(scores), abs=2e-5)


def _bold(shards: Shards, sample: int, label: str) -> np.ndarray:
    described = shards.manifest.samples[sample]
    return shards.read(sample, "bold", 0, described.n_trs, row=described.subjects.index(label)).astype(np.float64)


def _signal(full: Path, shards: Shards, sample: int, label: str) -> np.ndarray:
    described = shards.manifest.samples[sample]
    with h5py.File(full / "truth.h5") as file:
        signal: np.ndarray = file[f"{label}/{described.key}"][: described.n_trs]
    return signal.astype(np.float64)


def test_repeats_share_the_signal_but_not_the_noise(shards: Shards, full: Path) -> None:
    one, two = (i for i, s in enumerate(shards.manifest.samples) if s.run == "figures01")
    np.testing.assert_allclose(_signal(full, shards, one, "1")[:100], _signal(full, shards, two, "1")[:100])
    noise = [(_bold(shards, i, "1") - _signal(full, shards, i, "1"))[:100] for i in (one, two)]
    assert abs(_pearson(*noise)) < 0.1


def test_noise_is_correlated_in_time_and_inside_networks(shards: Shards, full: Path) -> None:
    noise = np.concatenate([_bold(shards, i, "1") - _signal(full, shards, i, "1") for i in range(10)])
    assert _pearson(noise[1:], noise[:-1]) == pytest.approx(make_synthetic.NOISE_MEMORY, abs=0.05)
    network = np.arange(200) * 14 // 200 % 7
    correlation = np.corrcoef(noise.T) - np.eye(200)
    same = network[:, None] == network
    assert correlation[same].mean() > 0.3 > 0.05 > abs(correlation[~same].mean())


def test_an_encoder_with_a_kernel_can_reach_the_ceiling(shards: Shards, full: Path) -> None:
    """Ridge on the features at 9 lags, half shared and half own, on seasons 1 to 5, bourne and wolf."""
    samples = shards.manifest.samples
    training = [i for i, s in enumerate(samples) if (s.season or 9) < 6 or s.film in ("bourne", "wolf")]
    held_out = [i for i, s in enumerate(samples) if s.season == 6]
    train, test = ([_lagged(shards, i) for i in chosen] for chosen in (training, held_out))
    everything = np.concatenate(train)
    solve = np.linalg.inv(everything.T @ everything + 1e5 * np.eye(everything.shape[1], dtype=np.float32))
    sums = {}
    for label in shards.manifest.subjects:
        here = [(x, _bold(shards, i, label)) for x, i in zip(train, training, strict=True)
                if label in samples[i].subjects]  # fmt: skip
        sums[label] = np.sum([x.T @ bold.astype(np.float32) for x, bold in here], 0)
    shared = np.mean(list(sums.values()), 0)
    inputs = np.concatenate(test)
    scores = [
        _pearson(inputs @ (solve @ (0.5 * own + 0.5 * shared)), np.concatenate([_bold(shards, i, s) for i in held_out]))
        for s, own in sums.items()
    ]
    assert np.mean(scores) > 0.93 * json.loads((full / "truth.json").read_text())["seasons"]["6"]


def _lagged(shards: Shards, sample: int) -> np.ndarray:
    """(T, 9 D) z-scored features at lags 0 to 8."""
    n_trs = shards.manifest.samples[sample].n_trs
    parts = []
    for stream in shards.manifest.streams:
        moments = shards.manifest.moments(stream.name).combine()
        values = (shards.read(sample, stream.name, 0, n_trs) - moments.mean) / moments.std()
        parts.append(values.reshape(n_trs, -1))
    joined = np.concatenate(parts, 1).astype(np.float32)
    return np.concatenate([np.pad(joined, ((lag, 0), (0, 0)))[:n_trs] for lag in range(9)], 1)


def test_same_seed_same_data_and_another_seed_other_data(tmp_path: Path) -> None:
    for name, seed in (("a", "4"), ("b", "4"), ("c", "5")):
        assert make_synthetic.main(["--out", str(tmp_path / name), "--tiny", "--seed", seed]) == 0
    values = {}
    for name in "abc":
        with h5py.File(next((tmp_path / name).rglob("sub-01_task-friends*.h5"))) as file:
            values[name] = {key: file[key][:20] for key in file}
    assert values["a"].keys() == values["b"].keys() != values["c"].keys()
    assert all(np.array_equal(values["a"][key], values["b"][key]) for key in values["a"])
    assert (tmp_path / "a/truth.json").read_text() != (tmp_path / "c/truth.json").read_text()


def test_output_that_holds_something_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").write_text("x")
    assert make_synthetic.main(["--out", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err
    assert make_synthetic.main(["--out", str(tmp_path / "mine/deeper")]) == 2
    assert "cannot be written" in capsys.readouterr().err
