"""An invented data set: another layout than the shipped ones, small enough to be written for every test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import numpy as np
import pytest

from trainer.data.manifest import Manifest, Moments, Sample, Stream, describe_file, write_statistics
from trainer.data.shards import SampleContent, Shards, write_shard

LAYOUT = r"""
name: invented
tr: 2.0
subjects: {a: person_A, b: person_B, 3: person_C}
series:
  cinema:
    bold: {file: "scans/{subject}/*/{subject}.hdf5", dataset: "day{session}/{run}[_rep{repeat}]"}
    runs: (?P<film>[a-z]+)_(?P<part>\d+)
feature_files: ["stimuli/{model}/**/{run}.hdf5"]
features:
  text.v2: {folder: Text, layers: {emb: embedding}}
  video: {folder: Video}
  audio: {folder: Audio, layers: {mono: wave}, dtype: float32}
include_features: [text.v2/emb, video/deep, audio/mono]
"""
FOLDERS = {"a": "person_A", "b": "person_B", "3": "person_C"}
PARCELS = 6
LENGTHS = {"alpha_1": 30, "alpha_2": 24, "beta_1": 20}


@dataclass
class Invented:
    """The source files and what was written into them, by (run, repeat, subject) and (run, model)."""

    root: Path
    bold: dict[tuple[str, int, str], np.ndarray] = field(default_factory=dict)
    features: dict[tuple[str, str], np.ndarray] = field(default_factory=dict)

    @property
    def layout(self) -> Path:
        return self.root / "layout.yaml"

    def bold_file(self, subject: str) -> Path:
        return self.root / f"scans/{FOLDERS[subject]}/x/{FOLDERS[subject]}.hdf5"

    def feature_file(self, model: str, run: str) -> Path:
        return self.root / f"stimuli/{model}/{run.split('_')[0]}/{run}.hdf5"

    def arguments(self, out: Path, *more: str) -> list[str]:
        return ["--layout", str(self.layout), "--root", str(self.root), "--out", str(out), *more]

    def put_bold(self, subject: str, dataset: str, values: np.ndarray) -> None:
        _put(self.bold_file(subject), dataset, values)

    def put_features(self, model: str, run: str, dataset: str, values: np.ndarray) -> None:
        _put(self.feature_file(model, run), dataset, values)


def _put(path: Path, dataset: str, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "a") as file:
        if dataset in file:
            del file[dataset]
        file[dataset] = values


def write_invented(root: Path) -> Invented:
    """alpha_2 lacks subject 3; beta_1 was shown twice; scans and features are a TR or two off."""
    root.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(7)
    made = Invented(root)
    made.layout.write_text(LAYOUT)
    day = iter(rng.permutation(900) + 100)
    scans = [("alpha_1", 1, ""), ("alpha_2", 1, ""), ("beta_1", 1, "_rep1"), ("beta_1", 2, "_rep2")]
    for run, repeat, suffix in scans:
        for i, subject in enumerate(s for s in FOLDERS if (run, s) != ("alpha_2", "3")):
            values = rng.normal(3, 2, (LENGTHS[run] + (i + repeat) % 2, PARCELS)).astype(np.float32)
            made.put_bold(subject, f"day{next(day)}/{run}{suffix}", values)
            made.bold[run, repeat, subject] = values
    shapes = {"Text": ("embedding", (4,), np.float64), "Video": ("deep", (2, 3), np.float32)}
    shapes["Audio"] = ("wave", (1, 5), np.float32)
    for run, off in (("alpha_1", -2), ("alpha_2", 0), ("beta_1", 2)):
        for model, (dataset, shape, dtype) in shapes.items():
            values = rng.normal(1, 3, (LENGTHS[run] + off, *shape)).astype(dtype)
            made.put_features(model, run, dataset, values)
            made.features[run, model] = values
    return made


def write_shards(
    folder: Path, samples: Sequence[SampleContent], subjects: Sequence[str], parcels: int, streams: Sequence[Stream]
) -> Manifest:
    """Shards of given arrays, one tar a sample, without any source files. `bold` has a row for every subject."""
    folder.mkdir(parents=True, exist_ok=True)
    described, records, moments = [], [], []
    for i, content in enumerate(samples):
        path = folder / f"shard-{i:05d}.tar"
        places = write_shard(path, [content])[content.key]
        n_trs = content.arrays["bold"].shape[1]
        described.append(
            Sample(content.key, i, "s", content.key, 1, None, None, None, None, n_trs, tuple(subjects), places)
        )
        records.append(describe_file(path))
        moments.append({name: Moments.of(content.arrays[name]) for name in (s.name for s in streams)})
        moments[-1]["bold"] = Moments.stack([Moments.of(row) for row in content.arrays["bold"]])
    statistics = write_statistics(folder, {n: Moments.stack([m[n] for m in moments]) for n in moments[0]})
    manifest = Manifest(
        "made",
        1.5,
        tuple(subjects),
        parcels,
        tuple(streams),
        tuple(described),
        tuple(records),
        statistics,
        folder=folder,
    )
    manifest.save(folder)
    return manifest


@pytest.fixture
def invented(tmp_path: Path) -> Invented:
    """A fresh copy, to be spoilt."""
    return write_invented(tmp_path / "source")


@pytest.fixture(scope="session")
def invented_source(tmp_path_factory: pytest.TempPathFactory) -> Invented:
    """The data set, not to be changed."""
    return write_invented(tmp_path_factory.mktemp("invented"))


@pytest.fixture(scope="session")
def invented_folder(invented_source: Invented) -> Path:
    """Its shards in two tars or more, not to be changed."""
    from tools.make_shards import main

    out = invented_source.root / "shards"
    assert main(invented_source.arguments(out)) == 0
    return out


@pytest.fixture(scope="session")
def invented_shards(invented_folder: Path) -> Shards:
    """Its shards, opened."""
    return Shards(invented_folder)
