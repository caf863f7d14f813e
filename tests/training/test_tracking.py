"""The log goes to TensorBoard too, and goes on where a resume does."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trainer.errors import InputError
from trainer.run.directory import StageDirectory
from trainer.run.processes import make_processes
from trainer.training.tracking import Tracker, check_tracker


def test_tensorboard_shows_the_lines_and_a_resume_takes_the_place_of_what_it_repeats(tmp_path: Path) -> None:
    make_processes(precision="no", deterministic=False, timeout_s=60)
    stage = StageDirectory(tmp_path)
    for first, factor in ((1, 1.0), (3, 10.0)):
        with Tracker("tensorboard", stage, "Stage 1", {"seed": 1}, first - 1) as tracker:
            for step in range(first, 6):
                tracker.log(step, loss=factor * step, grad_norm=None)
    found = EventAccumulator(str(stage.metrics.parent))
    found.Reload()
    assert found.Tags()["scalars"] == ["loss"]
    values = {event.step: event.value for event in found.Scalars("loss")}
    assert values == {1: 1.0, 2: 2.0, 3: 30.0, 4: 40.0, 5: 50.0}


def test_a_tracker_that_is_not_installed_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"wandb is not installed.*fmri-flow\[wandb\]"):
        check_tracker("wandb")
    check_tracker("none")
