"""Set-up that many tests share: the real data beside the project, tiny shards, a tiny finished run."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # tests import the tools as `tools.make_shards`

# Small tensors gain nothing from threads, and lose much where cores are shared.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real data and reference tensors that lies beside the project on some machines."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("the folder shared/ with real data does not lie beside the project")
    return folder


@pytest.fixture(scope="session")
def tiny_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny synthetic data in Algonauts layout."""
    from tools.make_synthetic import main

    folder = tmp_path_factory.mktemp("tiny") / "source"
    assert main(["--tiny", "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="session")
def tiny_shards(tiny_source: Path) -> Path:
    """Shards of the tiny synthetic data."""
    from tools.make_shards import main

    folder = tiny_source.parent / "shards"
    layout = str(ROOT / "configs" / "datasets" / "algonauts2025.yaml")
    streams = ["llama_3.2_3b/layers.11", "whisper/layers.12"]
    arguments = ["--layout", layout, "--root", str(tiny_source), "--out", str(folder), "--features", *streams]
    assert main(arguments) == 0
    return folder


@pytest.fixture(scope="session")
def debug_config() -> Path:
    """configs/debug.yaml."""
    return ROOT / "configs" / "debug.yaml"


@pytest.fixture(scope="session")
def debug_run(tmp_path_factory: pytest.TempPathFactory, tiny_shards: Path, debug_config: Path) -> Path:
    """A finished run of configs/debug.yaml on the tiny data; tests must not write into it."""
    from trainer.cli import main

    run = tmp_path_factory.mktemp("runs") / "debug"
    assert main(["train", "--config", str(debug_config), "--run", str(run), f"data.shards={tiny_shards}"]) == 0
    return run


@pytest.fixture(scope="session")
def wide_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration of both stages whose shards hold more parcels than a covariance is made of."""
    from tests.wide import write_wide

    return write_wide(tmp_path_factory.mktemp("wide"))
