"""A published encoder's checkpoint becomes a run: scored, predicted with, exported like any other."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import trainer
from tests.scoring.conftest import make_anchor
from tools.import_upstream import main
from trainer.cli import main as command
from trainer.config import load_config
from trainer.data.batches import whole_runs
from trainer.data.study import Study
from trainer.models.anchor import Anchor
from trainer.models.upstream import _anchor_names
from trainer.run import checkpoint

ROOT = Path(__file__).resolve().parents[1]
SAID = {"embed_dim": 8, "encoder_kernel_size": 5, "encoder_causal": True, "global_pool": "avg"}


def published_names(anchor: Anchor, n_subjects: int) -> dict[str, Tensor]:
    """Our weights under the names that the published code gives them, with its causal mask."""
    weights: dict[str, Tensor] = {}
    for name, tensor in anchor.state_dict().items():
        if name.startswith("streams.") and name.endswith((".mean", ".scale")):
            continue
        published = _anchor_names(name, n_subjects, True)
        weights |= {published[0]: tensor} if len(published) == 1 else dict(zip(published, tensor, strict=True))
    return {**weights, "feat_embeds.0.conv.attn_mask": torch.ones(5)}


class Published:
    """An anchor, the checkpoint that its publisher saved, and the command that imports it."""

    def __init__(self, folder: Path, shards: Path, config: Path) -> None:
        self.folder, self.shards, self.config = folder, shards, config
        self.options = [f"data.shards={shards}", "stage1.model.encoder_causal=true"]
        self.study = Study(load_config(config, self.options))
        self.anchor = make_anchor(self.study)
        self.content: dict[str, Any] = {
            "cfg": {"include_features": self.study.config.include_features, "model": dict(SAID), "lr": 3e-4},
            "model": published_names(self.anchor, 4),
            "epoch": 3,
            "acc": np.float64(0.2),
            "metrics": {"val": {"accmap": np.arange(4.0)}},
        }

    def arguments(self, *more: str) -> list[str]:
        torch.save(self.content, self.folder / "ckpt.pt")
        run = self.folder / "run"
        return [str(self.folder / "ckpt.pt"), "--run", str(run), "--config", str(self.config), *self.options, *more]


@pytest.fixture
def published(tmp_path: Path, tiny_shards: Path, debug_config: Path) -> Published:
    return Published(tmp_path, tiny_shards, debug_config)


def test_it_predicts_what_the_published_weights_predict(
    published: Published, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main(published.arguments()) == 0
    assert json.loads((run / "stage1" / "finished.json").read_text())["step"] == 1
    assert load_config(run / "stage1" / "config.yaml").stage1.standardise_features is False
    found = checkpoint.load(checkpoint.folder_of(run / "stage1" / "checkpoints", 1), weights_only=True).model
    assert all(torch.equal(found[name], tensor) for name, tensor in published.anchor.state_dict().items())

    assert command(["evaluate", str(run)]) == 0
    assert "Stage 1 Overall Pearson's r: " in capsys.readouterr().out
    assert {json.loads(path.read_text())["set"] for path in run.rglob("scores/*.json")} == {"val", "test"}
    assert command(["status", str(run)]) == 0
    assert "finished" in capsys.readouterr().out
    assert command(["export", str(run), "--out", str(tmp_path / "model")]) == 0
    study, model = published.study, trainer.load(tmp_path / "model")
    for batch in whole_runs(study.shards, study.spans["val"], study.streams):
        with torch.no_grad():
            expected = published.anchor(batch.features, batch.mask)[0].numpy()
        streams = zip(study.streams, batch.features, strict=True)
        predicted = model.predict({stream.name: rows[0] for stream, rows in streams})
        np.testing.assert_array_equal(predicted, expected)


def test_bare_weights_are_taken_at_the_word_of_the_configuration(published: Published, tmp_path: Path) -> None:
    published.content = published.content["model"]
    assert main(published.arguments()) == 0
    assert (tmp_path / "run" / "stage1" / "checkpoints" / "step_00000001" / "meta.json").exists()


def refused(capsys: pytest.CaptureFixture[str], published: Published, *more: str) -> str:
    assert main(published.arguments(*more)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert not (published.folder / "run").exists()
    return error


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("stage1.model.encoder_causal=false", "stage1.model.encoder_causal: found False, expected True as in"),
        ("stage1.model.embed_dim=16", "stage1.model.embed_dim: found 16, expected 8 as in"),
        ("include_features=[whisper/layers.12, llama_3.2_3b/layers.11]", "include_features: found whisper/layers.12, "),
        ("stage1.model.with_shared_decoder=false", "no place for: found shared_decoder.bias"),
        ("stage1.model.hidden_model=conv1dnext", "hidden_model: cannot be imported: found conv1dnext, expected null"),
        ("data.shards=nowhere", "nowhere"),
    ],
)
def test_what_the_checkpoint_and_the_configuration_say_must_agree(
    published: Published, capsys: pytest.CaptureFixture[str], override: str, words: str
) -> None:
    assert words in refused(capsys, published, override)


def test_weights_of_other_shapes_are_named(published: Published, capsys: pytest.CaptureFixture[str]) -> None:
    weights = published.content["model"]
    weights["shared_decoder.weight"] = torch.zeros(1000, 8)
    message = refused(capsys, published)
    assert "shared_decoder.weight has another shape: found (1000, 8), expected (20, 8)" in message
    del weights["subject_decoders.3.weight"], weights["shared_decoder.weight"]
    assert "a tensor is missing" in refused(capsys, published)


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch '{self.path}'",)


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, {"model": 5}, {"model": {"a": 1}}, {}])
def test_a_file_without_weights_is_named(
    published: Published, capsys: pytest.CaptureFixture[str], content: Any
) -> None:
    published.content = content
    assert "ckpt.pt: " in refused(capsys, published)


def test_a_malicious_checkpoint_does_not_run(published: Published, capsys: pytest.CaptureFixture[str]) -> None:
    published.content["metrics"] = Malicious(published.folder / "it ran")
    assert "could run code" in refused(capsys, published)
    assert not (published.folder / "it ran").exists()


def test_a_run_that_is_there_is_left_alone(published: Published, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(published.arguments()) == 0
    before = (published.folder / "run" / "stage1" / "finished.json").read_text()
    assert main(published.arguments()) == 2
    assert "holds another training" in capsys.readouterr().err
    assert (published.folder / "run" / "stage1" / "finished.json").read_text() == before
