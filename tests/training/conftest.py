"""Shared set-up: a study of the tiny shards, anchors of one value, and a lab of two people and three scans."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import yaml

from trainer.cli import main
from trainer.config import Config, load_config
from trainer.data.study import Study
from trainer.models.anchor import Anchor
from trainer.models.build import build_anchor
from trainer.scoring.predictor import shapes_of

LENGTHS = {"a1": 40, "a2": 40, "b1": 30}
LAYOUT = """
name: lab
tr: 1.5
subjects: {1: sub-01, 2: sub-02}
series: {s: {bold: {file: "fmri/{subject}.h5", dataset: "task-{run}"}, runs: '.+'}}
feature_files: ["features/{model}/{run}.h5"]
features: {m1: {folder: m1, dtype: float32}, m2: {folder: m2, dtype: float32}}
include_features: [m1/layer, m2/layer]
"""
CONFIG = """
include_features: [m1/layer, m2/layer]
datasets: {train: {filter: {runs: [a*]}}, val: {filter: {runs: [b*]}}}
val_set_name: val
sample_length: 16
num_samples: 16
batch_size: 4
log_every: 4
tracker: none
stage1: {epochs: 2, lr: 0.01, model: {embed_dim: 8, encoder_kernel_size: 5}}
stage2:
  epochs: 1
  snapshot_every_epochs: 1
  latent_dim: 4
  n_timesteps: 4
  cross_fit: 2
  decoder: {channels: [8, 8], attention_head_dim: 2, num_heads: 1, num_mid_blocks: 1}
evaluate: {samples: 2, bootstrap: 0}
"""
ALONE = "datasets.train.filter.subjects=['1']"
"""The second subject is in validation only."""

Change = Callable[[str, str, np.ndarray], np.ndarray | None]
"""(subject or model, run, values (T, V) or (T, D)) -> what is written instead; None: nothing."""


@dataclass(frozen=True)
class Lab:
    """The folder with shards and a configuration of them."""

    folder: Path

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def config(self, *overrides: str) -> Config:
        return load_config(self.folder / "c.yaml", list(overrides))

    def study(self, *overrides: str) -> Study:
        return Study(self.config(*overrides))

    def train(self, *arguments: str) -> int:
        return main(["train", "--config", str(self.folder / "c.yaml"), "--run", str(self.run), *arguments])


@pytest.fixture
def make_lab(tmp_path: Path) -> Callable[..., Lab]:
    """A function that writes a lab whose BOLD and features `bold` and `features` change."""

    def make(bold: Change | None = None, features: Change | None = None, parcels: int = 12) -> Lab:
        from tools.make_shards import main as make_shards

        rng = np.random.default_rng(1)
        mix, widths = rng.standard_normal((4, parcels)), {"m1": 6, "m2": 4}
        for run, n_trs in LENGTHS.items():
            latents = rng.standard_normal((n_trs, 4))
            for model, width in widths.items():
                values = latents @ np.random.default_rng(width).standard_normal((4, width))
                _write(tmp_path / f"features/{model}/{run}.h5", "layer", model, run, values, features)
            for subject in ("sub-01", "sub-02"):
                values = (latents @ mix + rng.standard_normal((n_trs, parcels))) / 2
                _write(tmp_path / f"fmri/{subject}.h5", f"task-{run}", subject, run, values, bold)
        (tmp_path / "layout.yaml").write_text(LAYOUT)
        (tmp_path / "c.yaml").write_text(CONFIG + yaml.safe_dump({"data": {"shards": str(tmp_path / "shards")}}))
        layout, shards = str(tmp_path / "layout.yaml"), str(tmp_path / "shards")
        assert make_shards(["--layout", layout, "--root", str(tmp_path), "--out", shards]) == 0
        return Lab(tmp_path)

    return make


def _write(path: Path, dataset: str, name: str, run: str, values: np.ndarray, change: Change | None) -> None:
    written = values if change is None else change(name, run, values)
    if written is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with h5py.File(path, "a") as file:
            file[dataset] = written.astype("f4")


@pytest.fixture
def study(tiny_shards: Path, debug_config: Path) -> Study:
    return Study(load_config(debug_config, [f"data.shards={tiny_shards}"]))


def constant_anchor(study: Study, value: float) -> Anchor:
    anchor = build_anchor(study.config.stage1.model, shapes_of(study))
    for name, parameter in anchor.named_parameters():
        torch.nn.init.constant_(parameter, value if name.endswith("bias") and "decoder" in name else 0.0)
    return anchor
