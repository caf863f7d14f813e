"""A tiny lab whose data can be changed and built again: two people, three runs and one more that is only scored."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from zlib import crc32

import h5py
import numpy as np
import yaml

from trainer.data.manifest import Manifest

CONFIG = """
include_features: [m1/layer, m2/layer]
datasets:
  train: {filter: {runs: ['a*']}}
  val: {filter: {runs: ['b*']}}
  test: {filter: {runs: ['c*']}}
val_set_name: val
sample_length: 16
num_samples: 16
batch_size: 4
log_every: 4
tracker: none
stage1: {epochs: 2, lr: 0.01, model: {embed_dim: 8, encoder_kernel_size: 5}}
stage2:
  epochs: 2
  snapshot_every_epochs: 1
  latent_dim: 4
  n_timesteps: 2
  cross_fit: 2
  decoder: {channels: [8, 8], attention_head_dim: 8, num_mid_blocks: 1}
checkpoint: {keep_last: 9}
evaluate: {samples: 2, bootstrap: 10}
"""


@dataclass
class Lab:
    """What the lab measured: change it, and `build` the shards again.

    Attributes:
        runs: name -> TRs.
        subjects: labels, in the layout's order.
        widths: model -> values a TR.
        again: (subject or model, run) -> how often it was measured; each time gives other values.
        twice: run -> the run whose stimulus it shows under another name.
    """

    folder: Path
    runs: dict[str, int] = field(default_factory=lambda: {"a1": 40, "a2": 41, "b1": 30, "c1": 30})
    subjects: list[str] = field(default_factory=lambda: ["1", "2"])
    widths: dict[str, int] = field(default_factory=lambda: {"m1": 6, "m2": 4})
    again: dict[tuple[str, str], int] = field(default_factory=dict)
    twice: dict[str, str] = field(default_factory=dict)
    parcels: int = 12
    tr: float = 1.5
    name: str = "mine"

    @property
    def shards(self) -> Path:
        """Where the shards are built."""
        return self.folder / "shards"

    def values(self, who: str, run: str, width: int) -> np.ndarray:
        """(TRs, width) float32 of a person's scan or a model's features: what the stimulus gives, and own noise."""
        stimulus = self.twice.get(run, run)
        measured = stimulus if who in self.widths else run
        film = np.random.default_rng(crc32(stimulus.encode())).standard_normal((self.runs[run], 4))
        mix = np.random.default_rng(crc32(who.encode())).standard_normal((4, width))
        noise = np.random.default_rng([crc32(f"{who} {measured}".encode()), self.again.get((who, measured), 0)])
        return (film @ mix + noise.standard_normal((len(film), width))).astype(np.float32)

    def build(self, *options: str) -> Path:
        """Write the files and build the shards anew."""
        from tools.make_shards import main

        root = self.folder / "source"
        for folder in (root, self.shards):
            shutil.rmtree(folder, ignore_errors=True)
        for label in self.subjects:
            scans = {f"task-{run}": self.values(label, run, self.parcels) for run in self.runs}
            self._write(root / "fmri" / f"{label}.h5", scans)
        for model, width in self.widths.items():
            for run in self.runs:
                self._write(root / "features" / model / f"{run}.h5", {"layer": self.values(model, run, width)})
        layout = self.folder / "layout.yaml"
        layout.write_text(json.dumps(self.layout()))
        streams = [f"{model}/layer" for model in self.widths]
        arguments = ["--layout", str(layout), "--root", str(root), "--out", str(self.shards), "--features", *streams]
        assert main([*arguments, *options]) == 0
        return self.shards

    def layout(self) -> dict[str, object]:
        """Of the files."""
        return {
            "name": self.name,
            "tr": self.tr,
            "subjects": {label: label for label in self.subjects},
            "series": {"s": {"bold": {"file": "fmri/{subject}.h5", "dataset": "task-{run}"}, "runs": ".+"}},
            "feature_files": ["features/{model}/{run}.h5"],
            "features": {model: {"folder": model} for model in self.widths},
            "include_features": [f"{model}/layer" for model in self.widths],
        }

    def config(self, **more: object) -> Path:
        """The configuration of a training on the shards; `more` replaces sections."""
        path = self.folder / "config.yaml"
        content = yaml.safe_load(CONFIG) | {"data": {"shards": str(self.shards)}} | more
        path.write_text(yaml.safe_dump(content))
        return path

    def without_hashes(self) -> None:
        """Turn the shards into ones from before there were hashes of contents."""
        text = Manifest.read(self.shards)._text(with_hashes=False)
        (self.shards / "manifest.json").write_text(text)

    @staticmethod
    def _write(path: Path, arrays: dict[str, np.ndarray]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with h5py.File(path, "w") as file:
            for name, array in arrays.items():
                file.create_dataset(name, data=array)


def train(lab: Lab, run: Path, *options: str, **more: object) -> list[str]:
    """The arguments of a training."""
    return ["train", "--config", str(lab.config(**more)), "--run", str(run), *options]
