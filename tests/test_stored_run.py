"""A run and an export from commit c345edc keep their meaning: they resume, score, load and predict as they did then.

Bits are compared on the processor and library versions that made them, numbers elsewhere. Score files may gain keys.
"""

from __future__ import annotations

import json
import re
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from runpy import run_path

import h5py
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import trainer
from tools import make_shards
from trainer.cli import main
from trainer.data.manifest import Manifest
from trainer.data.shards import Shards

HERE = Path(__file__).parent / "data" / "c345edc"


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked folder; tests must not write into it."""
    folder = tmp_path_factory.mktemp("c345edc")
    with tarfile.open(HERE / "stored.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture
def copy(stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the run that a test may write into; the shards are found where the configuration says."""
    monkeypatch.chdir(stored)
    shutil.copytree(stored / "run", tmp_path / "run")
    return tmp_path / "run"


def machine() -> dict[str, str]:
    """What decides about the bits of a float32 result."""
    found = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    return {
        "cpu": found[1] if found else "",
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


@pytest.fixture(scope="module")
def same_machine(stored: Path) -> bool:
    """Whether the numbers were made by the same processor and libraries."""
    made_on: dict[str, str] = json.loads((stored / "machine.json").read_text())
    return made_on == machine()


def assert_same(found: np.ndarray, expected: np.ndarray, exact: bool, name: object) -> None:
    """Compare bits where `exact`, else numbers."""
    assert found.dtype == expected.dtype, name
    if exact:
        np.testing.assert_array_equal(found, expected, err_msg=str(name))
    else:
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5, err_msg=str(name))


def assert_same_weights(found: Path, expected: Path, exact: bool) -> None:
    """Compare the weights and moments of two checkpoint folders."""
    files = sorted(path.name for path in expected.glob("*.safetensors"))
    assert files == sorted(path.name for path in found.glob("*.safetensors"))
    for name in files:
        ours, theirs = load_file(found / name), load_file(expected / name)
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert_same(ours[key], value, exact, f"{found / name}: {key}")


def numbers(value: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    """The leaves of a JSON document by dotted key."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from numbers(inner, f"{prefix}{key}.")
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from numbers(inner, f"{prefix}{i}.")
    else:
        yield prefix, value


def assert_same_scores(found: Path, expected: Path, exact: bool) -> None:
    """Compare every file of a folder of scores with what stood there; further files and keys may be there."""
    paths = sorted(expected.iterdir())
    assert paths
    for path in paths:
        ours = found / path.name
        if path.suffix == ".npy":
            assert_same(np.load(ours), np.load(path), exact, ours)
        elif path.suffix == ".npz":
            with np.load(ours) as a, np.load(path) as b:
                for key in b:
                    if b[key].dtype.kind == "f":
                        assert_same(a[key], b[key], exact, f"{ours}: {key}")
                    else:
                        assert np.array_equal(a[key], b[key]), f"{ours}: {key}"
        else:
            a, b = (dict(numbers(json.loads(p.read_text()))) for p in (ours, path))
            b.pop("validation.", None)  # says who scored, the training or `evaluate`
            for key, value in b.items():
                if isinstance(value, float) and not exact:
                    assert a[key] == pytest.approx(value, rel=1e-4, abs=1e-5), f"{ours}: {key}"
                else:
                    assert a[key] == value, f"{ours}: {key}"


def test_shards_built_again_from_the_same_files_are_those_of_the_stored_run(stored: Path, tmp_path: Path) -> None:
    run_path(str(HERE / "source.py"))["main"](tmp_path / "src")
    arguments = ["--layout", str(HERE / "layout.yaml"), "--root", str(tmp_path / "src"), "--out", str(tmp_path / "new")]
    assert make_shards.main(arguments) == 0
    new, old = Manifest.read(tmp_path / "new"), Manifest.read(stored / "shards")
    assert old.digest in new.digests and old.digest != new.digest
    for path in (stored / "run").glob("stage*/checkpoints/*/meta.json"):
        assert json.loads(path.read_text())["shards"] in new.digests


STEPS = [("stage1", 16), ("stage1/refit", 16), ("stage2", 8), ("stage2", 16), ("stage2/refit", 8)]


def test_resumed_stage2_ends_at_the_stored_weights(copy: Path, stored: Path, same_machine: bool) -> None:
    """The second half of stage 2 and its refit, resumed from the stored step 8."""
    stage = copy / "stage2"
    (stage / "finished.json").unlink()
    shutil.rmtree(stage / "checkpoints" / "step_00000016")
    shutil.rmtree(stage / "refit")
    assert main(["train", "--config", str(HERE / "config.yaml"), "--run", str(copy), "--resume"]) == 0
    assert json.loads((stage / "finished.json").read_text())["step"] == 8
    for name, step in STEPS:
        folder = f"{name}/checkpoints/step_{step:08d}"
        assert_same_weights(copy / folder, stored / "run" / folder, same_machine)


def test_new_training_ends_at_the_stored_weights(
    stored: Path, tmp_path: Path, same_machine: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stored configuration, trained from nothing."""
    monkeypatch.chdir(stored)
    run = tmp_path / "run"
    assert main(["train", "--config", str(HERE / "config.yaml"), "--run", str(run)]) == 0
    for name, step in STEPS:
        folder = f"{name}/checkpoints/step_{step:08d}"
        assert_same_weights(run / folder, stored / "run" / folder, same_machine)


def test_scores_are_the_stored_ones(copy: Path, stored: Path, same_machine: bool) -> None:
    """Scores of the refits and of the last step removed, then taken again from the stored checkpoints."""
    folders = ("stage1/scores", "stage1/refit/scores", "stage2/scores", "stage2/refit/scores")
    removed = [*copy.glob("stage*/refit/scores/*"), *copy.glob("stage*/scores/step_00000016-*")]
    for path in removed:
        if not path.name.startswith("step_00000016-val") or "stage1" not in path.parts:  # by these stage 1 was chosen
            path.unlink()
    shutil.rmtree(copy / "ceilings")
    for step in ("best", "last"):
        assert main(["evaluate", str(copy), "--step", step]) == 0
    for name in folders:
        assert_same_scores(copy / name, stored / "run" / name, same_machine)
    for path in (stored / "run" / "ceilings").glob("*.npy"):
        assert_same(np.load(copy / "ceilings" / path.name), np.load(path), same_machine, path.name)


@pytest.mark.parametrize(("estimate", "samples"), [("mean", 1), ("sample", 2)])
def test_predictions_are_the_stored_ones(
    copy: Path, stored: Path, tmp_path: Path, same_machine: bool, estimate: str, samples: int
) -> None:
    """By `predict` from the run, and by `trainer.load` from the export."""
    out = tmp_path / "out.h5"
    more = ["--samples", str(samples)] if estimate == "sample" else []
    assert main(["predict", str(copy), "--set", "test", "--estimate", estimate, "--out", str(out), *more]) == 0
    shards = Shards(stored / "shards")
    manifest = shards.manifest
    number = next(i for i, sample in enumerate(manifest.samples) if sample.key == "s_c1_run-1")
    n_trs = manifest.samples[number].n_trs
    features = {stream.name: shards.read(number, stream.name, 0, n_trs) for stream in manifest.streams}
    exported = trainer.load(stored / "export").predict(features, estimate=estimate, samples=samples)
    with h5py.File(out) as ours, h5py.File(stored / f"{estimate}.h5") as theirs:
        for s, label in enumerate(manifest.subjects):
            expected = theirs[label]["s_c1_run-1"][:]
            assert_same(ours[label]["s_c1_run-1"][:], expected, same_machine, label)
            if estimate == "mean":
                assert_same(exported[s], expected, same_machine, f"{label}, export")
            else:
                assert exported[:, s].shape == expected.shape
