"""What decides in the loop, as pure functions; and the loop on a model small enough to check by hand."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from trainer.config import Config, OptimisationConfig
from trainer.data.batches import Batch
from trainer.errors import InputError
from trainer.run import checkpoint
from trainer.run.directory import StageDirectory, write_json
from trainer.run.processes import Interrupted, StopRequest, make_accelerator
from trainer.training.loop import Phase, Training, adamw, learning_rate, should_stop

STEPS_PER_EPOCH = 5


class Line(nn.Module):
    """Learns a slope and an offset; its data are a function of the window's number."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.zeros(1, 1))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, batch: Batch, epoch: int) -> tuple[Tensor, Tensor]:
        x = torch.sin(batch.windows.float() + epoch)
        error = (self.slope[0] * x + self.bias - (2 * x + 1)).square()
        return error.sum(), torch.tensor(error.numel())


class BreaksInEpoch1(Line):
    """Its loss is not a number from epoch 1 on."""

    def forward(self, batch: Batch, epoch: int) -> tuple[Tensor, Tensor]:
        """The sum of losses, and their number."""
        total, count = super().forward(batch, epoch)
        return (total * float("nan") if epoch == 1 else total), count


def batches(step: int) -> Iterator[Batch]:
    for k in itertools.count(step):
        windows = torch.arange(4) + 4 * (k % STEPS_PER_EPOCH)
        yield Batch([], torch.zeros(0), torch.zeros(0), torch.zeros(0), torch.zeros(0), windows)


def a_config(**checkpoints: Any) -> Config:
    return Config.model_validate(
        {
            "data": {"shards": "none"},
            "include_features": ["a/b"],
            "datasets": {"train": {}, "val": {}},
            "val_set_name": "val",
            "checkpoint": {"every_steps": 4, **checkpoints},
            "log_every": 3,
        }
    )


def a_phase(directory: Path, total: int = 20, patience: int | None = None, rs: dict[int, float] | None = None) -> Phase:
    torch.manual_seed(0)
    model = Line()
    stage = StageDirectory(directory)
    phase = Phase(
        title="Line",
        directory=stage,
        model=model,
        objective=model,
        batches=batches,
        steps_per_epoch=STEPS_PER_EPOCH,
        total_steps=total,
        schedule_steps=total,
        optimisation=OptimisationConfig(
            lr=0.05, weight_decay=0.0, schedule="cosine", warmup_steps=3, patience=patience
        ),
        facts={"shapes": {"n_parcels": 1}},
        val_set_name="val",
    )
    if rs is not None:

        def validate(step: int) -> float:
            score = {"step": step, "set": "val", "estimate": "mean", "pearson_r": rs[step], "validation": True}
            write_json(stage.scores / f"{step}.json", score)
            return rs[step]

        phase.validate, phase.validate_every = validate, STEPS_PER_EPOCH
    return phase


def run(phase: Phase, *, resume: bool = False, **checkpoints: Any) -> int:
    return Training(phase, make_accelerator("no"), a_config(**checkpoints), resume=resume).run()


def test_the_learning_rate_warms_up_and_follows_a_cosine_to_zero() -> None:
    cosine = OptimisationConfig(lr=1.0, warmup_steps=4, schedule="cosine")
    rates = [learning_rate(step, 24, cosine) for step in range(25)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[14] == pytest.approx(0.5)
    assert rates[24] == pytest.approx(0.0)
    assert learning_rate(1000, 24, OptimisationConfig(lr=1.0)) == 1.0


@given(st.lists(st.floats(-1, 1), max_size=12), st.integers(1, 4))
def test_it_stops_when_the_last_validations_brought_nothing_better(rs: list[float], patience: int) -> None:
    history = list(enumerate(rs))
    best = rs.index(max(rs)) if rs else 0
    assert should_stop(history, patience) == (len(rs) - 1 - best >= patience)
    assert not should_stop(history, None)


def test_it_learns_and_writes_down_loss_and_checkpoints(tmp_path: Path) -> None:
    phase = a_phase(tmp_path, total=200)
    assert run(phase) == 200
    assert phase.model.slope.item() == pytest.approx(2, abs=0.05)
    lines = phase.directory.read_metrics()
    assert lines[-1]["step"] == 200
    assert lines[-1]["loss"] < 0.01 < lines[0]["loss"]
    assert checkpoint.steps(phase.directory.checkpoints) == [196, 200]


@pytest.mark.parametrize("stopped_at", [1, 4, 5, 7, 13])
def test_a_resume_gives_the_weights_of_an_uninterrupted_training(tmp_path: Path, stopped_at: int) -> None:
    whole = a_phase(tmp_path / "whole")
    run(whole)
    part = a_phase(tmp_path / "part", total=stopped_at)
    part.schedule_steps = 20
    run(part)
    rest = a_phase(tmp_path / "part")
    assert run(rest, resume=True) == 20
    for name, parameter in whole.model.state_dict().items():
        assert torch.equal(parameter, rest.model.state_dict()[name]), name


def test_a_signal_leaves_a_checkpoint_of_the_very_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = a_phase(tmp_path / "whole")
    run(whole)
    phase = a_phase(tmp_path / "part")
    monkeypatch.setattr(StopRequest, "requested", property(lambda self: training.step == 7))
    monkeypatch.setattr(StopRequest, "leave", lambda self, step: (_ for _ in ()).throw(Interrupted(15, step)))
    training = Training(phase, make_accelerator("no"), a_config(), resume=False)
    with pytest.raises(Interrupted, match="SIGTERM at step 7"):
        training.run()
    assert checkpoint.steps(phase.directory.checkpoints)[-1] == 7
    monkeypatch.undo()
    rest = a_phase(tmp_path / "part")
    run(rest, resume=True)
    assert torch.equal(whole.model.slope, rest.model.slope)


def test_validation_stops_early_and_keeps_the_best(tmp_path: Path) -> None:
    rs = {5: 0.1, 10: 0.3, 15: 0.2, 20: 0.25, 25: 0.2, 30: 0.9}
    phase = a_phase(tmp_path, total=30, patience=2, rs=rs)
    assert run(phase, every_steps=None, keep_last=1) == 20
    assert checkpoint.steps(phase.directory.checkpoints) == [10, 20]
    assert run(a_phase(tmp_path, total=30, patience=2, rs=rs), resume=True) == 20


def test_a_validation_that_the_end_cut_off_is_made_up_for(tmp_path: Path) -> None:
    rs = {5: 0.1, 10: 0.3, 15: 0.2, 20: 0.4}
    run(a_phase(tmp_path, rs=None, total=10), every_steps=5)
    phase = a_phase(tmp_path, rs=rs)
    run(phase, resume=True)
    assert sorted(score["step"] for score in phase.directory.read_scores()) == [10, 15, 20]


def test_a_loss_that_is_not_finite_names_step_and_last_checkpoint(tmp_path: Path) -> None:
    phase = a_phase(tmp_path)

    phase.model = phase.objective = BreaksInEpoch1()
    with pytest.raises(FloatingPointError, match=r"loss nan, .* at step 6; last checkpoint: step 4"):
        run(phase)


def test_checkpoints_that_are_good_are_not_replaced_by_others(tmp_path: Path) -> None:
    phase = a_phase(tmp_path)

    phase.model = phase.objective = BreaksInEpoch1()
    config = a_config(every_steps=2, keep_last=1).model_copy(update={"log_every": 100})
    with pytest.raises(FloatingPointError, match="at step 6"):
        Training(phase, make_accelerator("no"), config, resume=False).run()
    assert checkpoint.steps(phase.directory.checkpoints) == [4]


def test_what_others_score_does_not_change_what_is_chosen(tmp_path: Path) -> None:
    rs = {5: 0.1, 10: 0.3, 15: 0.2, 20: 0.25}
    phase = a_phase(tmp_path, total=10, rs=rs)
    run(phase)
    score = {"step": 8, "set": "val", "estimate": "mean", "pearson_r": 0.9}
    write_json(phase.directory.scores / "8.json", score)
    assert checkpoint.best_step(phase.directory.read_scores(), "val") == 10
    resumed = Training(a_phase(tmp_path, rs=rs), make_accelerator("no"), a_config(), resume=True)
    assert resumed.history == [(5, 0.1), (10, 0.3)]


def test_a_resume_with_other_shards_is_refused(tmp_path: Path) -> None:
    run(a_phase(tmp_path, total=4))
    phase = a_phase(tmp_path)
    phase.facts = {"shapes": {"n_parcels": 2}}
    with pytest.raises(InputError, match=r"found \{'n_parcels': 1\}, expected \{'n_parcels': 2\}"):
        run(phase, resume=True)


def test_biases_and_norms_are_not_decayed() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    decayed, free = adamw(model, OptimisationConfig(weight_decay=0.3)).param_groups
    assert [p is model[0].weight for p in decayed["params"]] == [True]
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.3, 0.0)
    assert len(free["params"]) == 3
