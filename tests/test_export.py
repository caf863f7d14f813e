"""An exported model predicts the bits of its run, and needs nothing but its folder."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import trainer
from tests.test_cli import refused
from trainer.cli import main
from trainer.data.shards import Shards
from trainer.encoder import Encoder
from trainer.errors import InputError
from trainer.run import checkpoint

S7 = "datasets.s7.filter.seasons=[7]"


@pytest.fixture(scope="module")
def exported(debug_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both stages of the debug run; not to be changed."""
    folder = tmp_path_factory.mktemp("export") / "model"
    assert main(["export", str(debug_run), "--out", str(folder)]) == 0
    return folder


def features_of(shards: Path, key: str) -> dict[str, np.ndarray]:
    """The features of one run by stream, as the shards store them."""
    opened = Shards(shards)
    i, sample = next((i, s) for i, s in enumerate(opened.manifest.samples) if s.key == key)
    return {stream.name: opened.read(i, stream.name, 0, sample.n_trs) for stream in opened.manifest.streams}


def compare(model: Encoder, run: Path, shards: Path, tmp_path: Path, *options: str, **asked: Any) -> None:
    """Every run of season 7 as `predict` writes it and as the exported model says it."""
    out = tmp_path / f"{len(list(tmp_path.iterdir()))}.h5"
    assert main(["predict", str(run), "--set", "s7", "--out", str(out), S7, *options]) == 0
    with h5py.File(out) as file:
        assert tuple(file) == model.subjects
        for number, key in enumerate(sorted(file["1"])):
            found = model.predict(features_of(shards, key), number=number, **asked)
            for s, label in enumerate(model.subjects):
                np.testing.assert_array_equal(found[..., s, :, :], file[label][key][:])
            assert found.dtype == np.float32


def test_both_stages_predict_the_same_bits(exported: Path, debug_run: Path, tiny_shards: Path, tmp_path: Path) -> None:
    model = trainer.load(exported)
    compare(model, debug_run, tiny_shards, tmp_path)
    more = ["--estimate", "sample", "--samples", "2"]
    compare(model, debug_run, tiny_shards, tmp_path, *more, estimate="sample", samples=2)


def test_stage_1_alone_predicts_the_same_bits(debug_run: Path, tiny_shards: Path, tmp_path: Path) -> None:
    assert main(["export", str(debug_run), "--stage", "1", "--out", str(tmp_path / "model")]) == 0
    model = trainer.load(tmp_path / "model")
    compare(model, debug_run, tiny_shards, tmp_path, "--stage", "1")
    with pytest.raises(InputError, match="not one of this model's: found sample, expected mean"):
        model.predict(features_of(tiny_shards, "ood_chaplin1"), estimate="sample")
    assert not [name for name in load_file(tmp_path / "model" / "model.safetensors") if name.startswith("flow.")]


@pytest.mark.slow
def test_the_refit_is_exported_and_so_are_averaged_weights(
    debug_config: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    run, folder = tmp_path / "run", tmp_path / "model"
    options = ["train.refit=true", "stage2.ema=0.5", "stage2.cross_fit=0", "bold.standardise=subject", "tracker=none"]
    train = ["train", "--config", str(debug_config), "--run", str(run), f"data.shards={tiny_shards}", *options]
    assert main(train) == 0
    assert main(["export", str(run), "--out", str(folder)]) == 0
    compare(trainer.load(folder), run, tiny_shards, tmp_path)
    step = json.loads((run / "stage2" / "finished.json").read_text())["step"]
    refit = checkpoint.load(checkpoint.folder_of(run / "stage2" / "refit" / "checkpoints", step))
    weights = load_file(folder / "model.safetensors")
    assert refit.ema and all(torch.equal(weights[f"flow.{name}"], tensor) for name, tensor in refit.ema.items())
    assert any(not torch.equal(refit.model[name], tensor) for name, tensor in refit.ema.items())
    card = (folder / "README.md").read_text()
    assert "`val` chose its number of steps and is learnt from too" in card
    assert "| `test` | mean |" in card and "| `val` | mean |" not in card
    assert "z-scored over the subject's training TRs" in card


def test_three_lines_in_a_process_of_its_own_are_enough(exported: Path, tiny_shards: Path, tmp_path: Path) -> None:
    """Moved elsewhere, without shards, and what was imported before is nothing heavy."""
    shutil.copytree(exported, tmp_path / "moved")
    np.savez(tmp_path / "features.npz", **features_of(tiny_shards, "ood_chaplin2"))
    code = f"""
import sys, numpy
import trainer
assert not {{"torch", "pydantic", "h5py"}} & set(sys.modules), "import trainer is slow"
features = dict(numpy.load({str(tmp_path / "features.npz")!r}))
model = trainer.load({str(tmp_path / "moved")!r})
bold = model.predict(features)
print(bold.shape, model.subjects)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert found.returncode == 0, found.stderr
    n_trs = len(features_of(tiny_shards, "ood_chaplin2")["whisper/layers.12"])
    assert found.stdout.strip() == f"(4, {n_trs}, 20) ('1', '2', '3', '5')"


def test_the_folder_tells_nothing_of_this_machine(exported: Path, tiny_shards: Path, debug_run: Path) -> None:
    assert sorted(path.name for path in exported.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    for path in exported.iterdir():
        content = path.read_bytes()
        assert str(tiny_shards).encode() not in content and str(debug_run.parent).encode() not in content
        assert path.stat().st_mode & 0o044 == 0o044, "others may read it"


def test_the_model_card_is_one_that_the_hub_reads(exported: Path, debug_run: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    card = hub.ModelCard.load(exported / "README.md")
    assert card.data.license == "mit" and card.data.library_name == "fmri-flow"
    assert {"fmri", "brain-encoding"} <= set(card.data.tags)
    assert yaml.safe_load(str(card.data)) == card.data.to_dict()
    text = card.text
    step = json.loads((debug_run / "stage2" / "finished.json").read_text())["step"]
    for estimate in ("mean", "sample"):
        path = debug_run / "stage2" / "scores" / f"step_{step:08d}-test-{estimate}.json"
        assert f"| `test` | {estimate} | {json.loads(path.read_text())['pearson_r']:.4f}" in text
    for words in ("BOLD of 4 people in 20 parcels", 'trainer.load("', "| `whisper/layers.12` | (TRs, 32) |",
                  "trained on algonauts2025", "TR of 1.49 s", "| `val` | `{seasons: [6]}` |"):  # fmt: skip
        assert words in text, words


def test_float32_and_tensors_are_taken_too(exported: Path, tiny_shards: Path) -> None:
    model, features = trainer.load(exported), features_of(tiny_shards, "ood_chaplin1")
    expected = model.predict(features)
    wider = {name: torch.from_numpy(rows).float() for name, rows in features.items()}
    np.testing.assert_allclose(model.predict({**wider, "other": torch.zeros(3)}), expected, atol=1e-5)
    draws = [model.predict(features, estimate="sample", number=number) for number in (0, 1)]
    assert draws[0].shape == (1, *expected.shape) and np.abs(draws[0] - draws[1]).max() > 0.1


def test_features_that_do_not_fit_are_named(exported: Path, tiny_shards: Path) -> None:
    model, features = trainer.load(exported), features_of(tiny_shards, "ood_chaplin1")
    name = "whisper/layers.12"
    for changed, words in (
        ({}, "stream whisper/layers.12 is missing: found llama_3.2_3b/layers.11"),
        ({name: features[name][:, :5]}, r"array: found torch.float16 \(44, 5\), expected floats \(TRs, 32\)"),
        ({name: features[name][3:]}, "TRs: found .*, expected the same number"),
        ({name: features[name].astype(int)}, "found int64"),
    ):  # fmt: skip
        rest = {key: rows for key, rows in features.items() if key != name}
        with pytest.raises(InputError, match=words):
            model.predict({**rest, **changed})
    with pytest.raises(InputError, match="TRs"):
        model.predict({key: rows[:0] for key, rows in features.items()})
    with pytest.raises(InputError, match="samples: found 0"):
        model.predict(features, estimate="sample", samples=0)


def test_damaged_folders_are_refused(exported: Path, tmp_path: Path) -> None:
    def spoilt(number: int) -> Path:
        return Path(shutil.copytree(exported, tmp_path / str(number)))

    with pytest.raises(InputError, match=r"config\.json: missing"):
        trainer.load(tmp_path)
    folder = spoilt(1)
    (folder / "config.json").write_text('{"format": 9}')
    with pytest.raises(InputError, match=r"format: found 9, expected 1"):
        trainer.load(folder)
    folder = spoilt(2)
    facts = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**facts, "shapes": {"streams": [["a"]]}}))
    with pytest.raises(InputError, match=r"config\.json: shapes"):
        trainer.load(folder)
    (folder / "config.json").write_text(json.dumps({**facts, "config": {**facts["config"], "colour": 1}}))
    with pytest.raises(InputError, match="colour: unknown key"):
        trainer.load(folder)
    facts["shapes"]["n_parcels"] = 21
    (folder / "config.json").write_text(json.dumps(facts))
    with pytest.raises(InputError, match=r"model\.safetensors: does not fit config\.json"):
        trainer.load(folder)
    folder = spoilt(3)
    weights = load_file(folder / "model.safetensors")
    weights.pop("flow.latent.basis")
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"latent\.basis"):
        trainer.load(folder)
    content = (exported / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match="cannot be read"):
        trainer.load(folder)


def test_what_cannot_be_exported_is_refused(
    debug_run: Path, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "exists. Choose another --out" in refused(capsys, "export", str(debug_run), "--out", str(exported))
    assert "holds no training" in refused(capsys, "export", str(tmp_path), "--out", str(tmp_path / "model"))
    run = tmp_path / "run"
    shutil.copytree(debug_run / "stage1", run / "stage1")
    weights = max((run / "stage1" / "checkpoints").glob("step_*")) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    assert "altered since it was written" in refused(capsys, "export", str(run), "--out", str(tmp_path / "model"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    shutil.rmtree(run / "stage1" / "checkpoints")
    assert "holds no checkpoint" in refused(capsys, "export", str(run), "--out", str(tmp_path / "model"))
