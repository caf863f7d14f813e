"""Plans for tests of what is done with them: a run, tiny shards that are only pretended, settings of a test's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from trainer.cluster.plan import Plan, make_plan

MakePlan = Callable[..., Plan]


@pytest.fixture
def make(tmp_path: Path, debug_config: Path, monkeypatch: pytest.MonkeyPatch) -> MakePlan:
    """A function that plans the run tmp_path/run of configs/debug.yaml, with lines of settings and with overrides."""
    shards = tmp_path / "shards"
    shards.mkdir()
    (shards / "manifest.json").touch()
    slurm = tmp_path / "site.yaml"

    def plan(settings: str = "{}", *overrides: str, array: Path | None = None) -> Plan:
        slurm.write_text(settings)
        given = [f"data.shards={shards}", *overrides]
        return make_plan(debug_config, slurm, tmp_path / "run", given, array=array)

    return plan
