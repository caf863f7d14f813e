"""A study of the tiny shards, and anchors that say the same of every TR."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from trainer.config import load_config
from trainer.data.study import Study
from trainer.models.anchor import Anchor
from trainer.models.build import build_anchor
from trainer.scoring.predictor import shapes_of


@pytest.fixture
def study(tiny_shards: Path, debug_config: Path) -> Study:
    return Study(load_config(debug_config, [f"data.shards={tiny_shards}"]))


def constant_anchor(study: Study, value: float) -> Anchor:
    anchor = build_anchor(study.config.stage1.model, shapes_of(study))
    for name, parameter in anchor.named_parameters():
        torch.nn.init.constant_(parameter, value if name.endswith("bias") and "decoder" in name else 0.0)
    return anchor
