"""Which checkpoint of a run predicts: one rule for predictions, exports, and whoever else uses a trained model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trainer.config import Config
from trainer.errors import InputError
from trainer.run import checkpoint
from trainer.run.directory import RunDirectory, StageDirectory
from trainer.stored import load_stored


@dataclass(frozen=True)
class Chosen:
    """A checkpoint: of which stage, in which directory (a stage's own, or its refit's), which step, and the config."""

    stage: int
    directory: StageDirectory
    step: int
    config: Config


def chosen_checkpoint(run: RunDirectory, stage: int | None = None, overrides: Sequence[str] = ()) -> Chosen:
    """The refit of a finished stage where there is one, else the best checkpoint so far, else the newest.

    Args:
        run: the run.
        stage: 1 or 2; without it stage 2 where it is finished, else stage 1.
        overrides: `key=value` for the stage's configuration.

    Raises:
        InputError: the stage has not been trained, or has no checkpoint yet.
    """
    number = stage or (2 if run.stage(2).finished() is not None else 1)
    directory = run.stage(number)
    if not directory.has_started():
        raise InputError(directory.path, f"holds no training of stage {number}", expected="a run directory")
    config, finished = load_stored(directory.config, overrides), directory.finished()
    if finished is not None and config.train.refit:
        return _there(number, directory.refit, int(finished["step"]), config)
    steps = checkpoint.steps(directory.checkpoints)
    best = checkpoint.best_step(directory.read_scores(), config.val_set_name)
    if best is None and steps:
        best = steps[-1]
    return _there(number, directory, best, config)


def _there(stage: int, directory: StageDirectory, step: int | None, config: Config) -> Chosen:
    if step is None or step not in checkpoint.steps(directory.checkpoints):
        raise InputError(directory.checkpoints, "holds no checkpoint" + ("" if step is None else f" of step {step}"))
    return Chosen(stage, directory, step, config)
