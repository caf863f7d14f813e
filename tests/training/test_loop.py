"""What decides in the loop, as pure functions; and the loop on a model small enough to check by hand."""

from __future__ import annotations

import itertools
import os
import signal
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
from trainer.run.processes import Interrupted, StopRequest, make_processes
from trainer.run.watchdog import Watchdog
from trainer.training.loop import Phase, Training, Watch, learning_rate, should_stop

STEPS_PER_EPOCH = 5
BATCH = 4


class Line(nn.Module):
    """Learns a slope and an offset; its data are a function of the window's number."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.zeros(1, 1))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, batch: Batch, epoch: int, terms: int) -> Tensor:
        x = torch.sin(batch.windows.float() + epoch)
        return (self.slope[0] * x + self.bias - (2 * x + 1)).square().sum() / terms


class Breaks(Line):
    """Its loss is not a number in some epochs."""

    def __init__(self, *epochs: int) -> None:
        super().__init__()
        self.epochs = epochs

    def forward(self, batch: Batch, epoch: int, terms: int) -> Tensor:
        """The loss."""
        return super().forward(batch, epoch, terms) * (float("nan") if epoch in self.epochs else 1.0)


def batches(step: int) -> Iterator[Batch]:
    for k in itertools.count(step):
        windows = torch.arange(BATCH) + BATCH * (k % STEPS_PER_EPOCH)
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
            "tracker": "none",
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
        terms=lambda step: BATCH,
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


def run(phase: Phase, *, resume: bool = False, config: Config | None = None, **checkpoints: Any) -> int:
    processes = make_processes(precision="no", deterministic=False, timeout_s=60)
    with StopRequest() as stop, Watchdog(processes, 60) as watchdog:
        watch = Watch(stop, None, watchdog)
        return Training(phase, processes, config or a_config(**checkpoints), watch, resume=resume).run()


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


def test_a_signal_leaves_a_checkpoint_of_the_very_step(tmp_path: Path) -> None:
    whole = a_phase(tmp_path / "whole")
    run(whole)
    phase = a_phase(tmp_path / "part")
    usual = phase.terms

    def terms(step: int) -> int:
        if step == 7:
            os.kill(os.getpid(), signal.SIGUSR1)
        return usual(step)

    phase.terms = terms
    with pytest.raises(Interrupted, match="SIGUSR1 at step") as caught:
        run(phase)
    assert caught.value.step in (8, 9)  # the step in which it came, or the next
    assert checkpoint.steps(phase.directory.checkpoints)[-1] == caught.value.step
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


def test_steps_without_a_finite_gradient_are_skipped_and_counted(tmp_path: Path) -> None:
    phase = a_phase(tmp_path, total=20)
    phase.model = phase.objective = Breaks(1, 3)
    assert run(phase) == 20
    last = phase.directory.read_metrics()[-1]
    assert last["skipped"] == 2 * STEPS_PER_EPOCH
    found = checkpoint.load(checkpoint.folder_of(phase.directory.checkpoints, 20))
    assert (found.meta["updates"], found.meta["skipped"]) == (10, 10)
    assert all(tensor.isfinite().all() for tensor in found.model.values())


def test_too_many_of_them_in_a_row_end_the_training_and_name_the_last_good_checkpoint(tmp_path: Path) -> None:
    phase = a_phase(tmp_path, total=100)
    phase.model = phase.objective = Breaks(*range(1, 20))
    expected = r"of 25 steps in a row, up to step 30, were not finite.* last good checkpoint: .*step_00000028"
    with pytest.raises(FloatingPointError, match=expected):
        run(phase, config=a_config(every_steps=4).model_copy(update={"log_every": 1000}))


def test_a_resume_goes_on_with_adams_own_count_and_the_number_of_skipped_steps(tmp_path: Path) -> None:
    whole = a_phase(tmp_path / "whole")
    whole.model = whole.objective = Breaks(1)
    run(whole)
    for total in (9, 20):
        part = a_phase(tmp_path / "part", total=total)
        part.schedule_steps = 20
        part.model = part.objective = Breaks(1)
        run(part, resume=total == 20)
    assert torch.equal(whole.model.slope, part.model.slope)
    assert part.directory.read_metrics()[-1]["skipped"] == STEPS_PER_EPOCH


def test_the_average_of_the_weights_is_what_is_validated_and_resumes(tmp_path: Path) -> None:
    seen: dict[int, Tensor] = {}

    def averaging(directory: Path, total: int = 20) -> Phase:
        phase = a_phase(directory, total=total, rs=dict.fromkeys(range(21), 0.1))
        phase.schedule_steps, phase.ema = 20, 0.5
        validate = phase.validate
        assert validate is not None

        def look(step: int) -> float:
            seen[step] = phase.model.slope.detach().clone()
            return validate(step)

        phase.validate = look
        return phase

    whole = averaging(tmp_path / "whole")
    run(whole)
    found = checkpoint.load(checkpoint.folder_of(whole.directory.checkpoints, 20))
    assert torch.equal(seen[20], found.ema["slope"])
    assert not torch.equal(seen[20], found.model["slope"])
    assert torch.equal(whole.model.slope, found.model["slope"])  # the training has its own weights back
    run(averaging(tmp_path / "part", total=7))
    run(averaging(tmp_path / "part"), resume=True)
    again = checkpoint.load(checkpoint.folder_of(tmp_path / "part" / "checkpoints", 20))
    assert torch.equal(again.ema["slope"], found.ema["slope"])


def test_checkpoints_come_by_the_clock_too(tmp_path: Path) -> None:
    phase = a_phase(tmp_path, total=6)
    run(phase, every_steps=None, every_minutes=1e-9, keep_last=9)
    assert checkpoint.steps(phase.directory.checkpoints) == [1, 2, 3, 4, 5, 6]


def test_what_others_score_does_not_change_what_is_chosen(tmp_path: Path) -> None:
    rs = {5: 0.1, 10: 0.3, 15: 0.2, 20: 0.25}
    phase = a_phase(tmp_path, total=10, rs=rs)
    run(phase)
    score = {"step": 8, "set": "val", "estimate": "mean", "pearson_r": 0.9}
    write_json(phase.directory.scores / "8.json", score)
    assert checkpoint.best_step(phase.directory.read_scores(), "val") == 10
    phase = a_phase(tmp_path, total=10, rs=rs)
    processes = make_processes(precision="no", deterministic=False, timeout_s=60)
    with StopRequest() as stop, Watchdog(processes, 60) as watchdog:
        resumed = Training(phase, processes, a_config(), Watch(stop, None, watchdog), resume=True)
    assert resumed.history == [(5, 0.1), (10, 0.3)]


def test_a_resume_with_other_shards_is_refused(tmp_path: Path) -> None:
    run(a_phase(tmp_path, total=4))
    phase = a_phase(tmp_path)
    phase.facts = {"shapes": {"n_parcels": 2}}
    with pytest.raises(InputError, match=r"found \{'n_parcels': 1\}, expected \{'n_parcels': 2\}"):
        run(phase, resume=True)
