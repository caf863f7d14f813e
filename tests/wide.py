"""BOLD of more parcels than a covariance is made of: two subjects, few TRs, a few slow latents in much white noise."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np

PARCELS = 6000
LENGTHS = {"a1": 90, "a2": 60, "a3": 70, "b1": 40}
LATENTS, WIDTH = 4, 8

LAYOUT = """
name: wide
tr: 1.5
subjects: {1: one, 2: two}
series:
  s:
    bold: {file: "fmri/{subject}.h5", dataset: "{run}"}
    runs: '.+'
feature_files: ["features/{model}/{run}.h5"]
features: {m: {folder: m}}
include_features: [m/layer]
"""
CONFIG = """
data: {{shards: "{shards}"}}
include_features: [m/layer]
datasets:
  train: {{filter: {{runs: [a*]}}}}
  val: {{filter: {{runs: [b*]}}}}
val_set_name: val
sample_length: 16
num_samples: 8
batch_size: 4
log_every: 1
tracker: none
stage1: {{epochs: 1, lr: 0.01, model: {{embed_dim: 4, encoder_kernel_size: 5}}}}
stage2:
  epochs: 1
  latent_dim: 4
  n_timesteps: 2
  cross_fit: 2
  decoder: {{channels: [8, 8], attention_head_dim: 4, num_mid_blocks: 1}}
"""


def write_wide(folder: Path) -> Path:
    """Write the data set, its shards and a configuration of both stages; returns the configuration's path."""
    from tools.make_shards import main

    rng = np.random.default_rng(0)
    maps, mixing = rng.standard_normal((2, LATENTS, PARCELS)), rng.standard_normal((LATENTS, WIDTH))
    source = folder / "source"
    for name in ("fmri", "features/m"):
        (source / name).mkdir(parents=True)
    with h5py.File(source / "fmri" / "one.h5", "w") as one, h5py.File(source / "fmri" / "two.h5", "w") as two:
        for run, length in LENGTHS.items():
            slow = np.cumsum(rng.standard_normal((length, LATENTS)), 0) / np.sqrt(length)
            for subject, file in enumerate((one, two)):
                bold = 0.2 * slow @ maps[subject] + rng.standard_normal((length, PARCELS)) + 3 * subject
                file[run] = bold.astype(np.float32)
            with h5py.File(source / "features" / "m" / f"{run}.h5", "w") as file:
                file["layer"] = (slow @ mixing).astype(np.float32)
    (folder / "layout.yaml").write_text(LAYOUT)
    shards, config = folder / "shards", folder / "wide.yaml"
    assert main(["--layout", str(folder / "layout.yaml"), "--root", str(source), "--out", str(shards)]) == 0
    config.write_text(CONFIG.format(shards=shards))
    return config
